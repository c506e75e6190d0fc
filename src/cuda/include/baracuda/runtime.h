// SPDX-License-Identifier: Apache-2.0
// The part of the CUDA runtime that the Python objects use, as plain C, so that they compile
// without a toolkit. In a build without CUDA every function returns BCY_ERROR_NO_CUDA. Streams and
// events are opaque pointers.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "baracuda/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct bcy_device_info {
  char name[256];
  int32_t major, minor;          // compute capability
  int32_t multiprocessors;
} bcy_device_info;

int bcy_cuda_built(void);                    // 1 when the kernels are in this build
const char* bcy_cuda_architectures(void);    // as in BARACUDA_CUDA_ARCHS, "" without CUDA
int bcy_cuda_toolkit_version(void);          // 13000 for 13.0; 0 without CUDA
int bcy_cuda_driver_version(int* version);   // 0 when there is no driver
int bcy_cuda_device_count(int* count);
int bcy_cuda_device_info(int device, bcy_device_info* info);
int bcy_cuda_has_kernels(
    int device);        // BCY_OK when this build's code runs on the device, else the CUDA error
int bcy_cuda_get_device(int* device);
int bcy_cuda_set_device(int device);
int bcy_cuda_memory_info(int device, int64_t* free_bytes, int64_t* total_bytes);
const char* bcy_cuda_error_name(int code);
const char* bcy_cuda_error_text(int code);

int bcy_cuda_stream_create(int device, int priority,
                           void** stream);   // does not wait for the legacy stream
int bcy_cuda_stream_destroy(int device, void* stream);
int bcy_cuda_stream_synchronize(int device, void* stream);
int bcy_cuda_stream_query(int device, void* stream, int* done);
int bcy_cuda_stream_wait(int device, void* stream, void* event);
int bcy_cuda_stream_is_capturing(int device, void* stream, int* capturing);
int bcy_cuda_stream_device(void* stream, int* device);  // -1 where it is captured
int bcy_cuda_stream_priority(int device, void* stream, int* priority);
int bcy_cuda_stream_priority_range(int device, int* least, int* greatest);

int bcy_cuda_event_create(int device, int timing, void** event);
int bcy_cuda_event_destroy(int device, void* event);
int bcy_cuda_event_record(int device, void* event, void* stream);
int bcy_cuda_event_synchronize(void* event);
int bcy_cuda_event_query(void* event, int* done);
int bcy_cuda_event_elapsed_ms(void* start, void* end, float* ms);

int bcy_cuda_malloc(int device, int64_t bytes, void* stream,
                    void** pointer);   // ordered on the stream
int bcy_cuda_free(int device, void* pointer, void* stream);
int bcy_cuda_malloc_host(int64_t bytes, void** pointer);
int bcy_cuda_free_host(void* pointer);
int bcy_cuda_memcpy(int device, void* to, const void* from, int64_t bytes,
                    void* stream);   // any direction, ordered
int bcy_cuda_memset(int device, void* to, int value, int64_t bytes, void* stream);
int bcy_cuda_pointer_device(const void* pointer, int* device_type,
                            int* device);   // DLPack device type and id

const void* bcy_cuda_probe_kernel(
    void);   // an empty kernel: whether it loads says whether the others do

#ifdef __cplusplus
}
#endif
