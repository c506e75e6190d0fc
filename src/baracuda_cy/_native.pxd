# SPDX-License-Identifier: Apache-2.0
# The C interface of src/cuda/include/baracuda: declarations only. `_cuda` and `_cpu` call these
# functions and are the only modules that link them; every other module uses the types and calls the
# wrappers of `_cuda.pxd` and `_cpu.pxd`.
from libc.stdint cimport int32_t, int64_t


cdef extern from "baracuda/status.h" nogil:
    enum:
        BCY_OK
        BCY_ERROR_NO_CUDA
        BCY_ERROR_UNKNOWN_FORMAT
        BCY_ERROR_UNSUPPORTED_TYPE
        BCY_ERROR_TOO_LARGE
        BCY_ERROR_OUT_OF_MEMORY
        BCY_ERROR_INVALID_ARGUMENT


cdef extern from "baracuda/api.h" nogil:
    ctypedef struct bcy_gguf_matmul_args:
        const void* weight
        const void* x
        void* y
        void* workspace
        const void* bias
        int64_t nrows
        int64_t ncols
        int64_t m
        int64_t x_stride
        int64_t y_stride
        int32_t format
        int32_t x_type
        int32_t y_type
        int32_t device
        int32_t overlap

    ctypedef struct bcy_gguf_dequantize_args:
        const void* weight
        void* y
        int64_t nrows
        int64_t ncols
        int64_t y_stride
        int32_t format
        int32_t y_type
        int32_t device

    ctypedef struct bcy_gguf_quantize_args:
        const void* x
        void* weight
        int64_t nrows
        int64_t ncols
        int64_t x_stride
        int32_t format
        int32_t x_type

    enum:
        BCY_NF4
        BCY_FP4
        BCY_BITSANDBYTES
        BCY_ROW_PAIR

    ctypedef struct bcy_nf4_weight:
        const void* codes
        const void* absmax
        const float* nested_absmax
        const float* nested_code
        int64_t nrows
        int64_t ncols
        int32_t block_size
        int32_t nested_block
        float nested_offset
        int32_t codebook
        int32_t layout

    ctypedef struct bcy_nf4_matmul_args:
        bcy_nf4_weight weight
        const void* x
        void* y
        const void* bias
        void* workspace
        int64_t m
        int64_t x_stride
        int64_t y_stride
        int32_t x_type
        int32_t y_type
        int32_t device
        int32_t overlap
        int32_t exact

    ctypedef struct bcy_nf4_dequantize_args:
        bcy_nf4_weight weight
        void* y
        int64_t y_stride
        int32_t y_type
        int32_t device

    ctypedef struct bcy_nf4_quantize_args:
        const void* x
        void* codes
        float* absmax
        int64_t count
        int32_t block_size
        int32_t codebook
        int32_t x_type
        int32_t device

    ctypedef struct bcy_nf4_nest_args:
        const float* absmax
        void* codes
        float* nested_absmax
        const float* nested_code
        int64_t count
        int32_t nested_block
        float offset
        int32_t device

    int64_t bcy_gguf_block_elements(int32_t format)
    int64_t bcy_gguf_block_bytes(int32_t format)
    int bcy_cuda_gguf_workspace_size(const bcy_gguf_matmul_args* args, int64_t* size)
    int64_t bcy_cpu_gguf_workspace_size(int32_t format, int64_t ncols, int64_t m)
    int bcy_cuda_gguf_needs_no_workspace(const bcy_gguf_matmul_args* args, int32_t* answer)
    int bcy_cuda_gguf_dequantize(const bcy_gguf_dequantize_args* args, void* stream)
    int bcy_cuda_gguf_matvec(const bcy_gguf_matmul_args* args, void* stream)
    int bcy_cuda_gguf_stage(const bcy_gguf_matmul_args* args, void* stream)
    int bcy_cuda_gguf_matmul(const bcy_gguf_matmul_args* args, void* stream)
    int bcy_cpu_gguf_dequantize(const bcy_gguf_dequantize_args* args, int threads)
    int bcy_cpu_gguf_matvec(const bcy_gguf_matmul_args* args, int threads)
    int bcy_cpu_gguf_stage(const bcy_gguf_matmul_args* args, int threads)
    int bcy_cpu_gguf_matmul(const bcy_gguf_matmul_args* args, int threads)
    int bcy_cpu_gguf_quantize(const bcy_gguf_quantize_args* args, int threads)
    int bcy_cuda_nf4_uses_tensor_cores(const bcy_nf4_matmul_args* args, int32_t* answer)
    int bcy_cuda_nf4_workspace_size(const bcy_nf4_matmul_args* args, int64_t* size)
    int bcy_cuda_nf4_matmul(const bcy_nf4_matmul_args* args, void* stream)
    int bcy_cuda_nf4_dequantize(const bcy_nf4_dequantize_args* args, void* stream)
    int bcy_cuda_nf4_quantize(const bcy_nf4_quantize_args* args, void* stream)
    int bcy_cuda_nf4_nest(const bcy_nf4_nest_args* args, void* stream)
    int bcy_cpu_nf4_matmul(const bcy_nf4_matmul_args* args, int threads)
    int bcy_cpu_nf4_dequantize(const bcy_nf4_dequantize_args* args, int threads)
    int bcy_cpu_nf4_quantize(const bcy_nf4_quantize_args* args, int threads)
    int bcy_cpu_nf4_nest(const bcy_nf4_nest_args* args, int threads)
    ctypedef void* (*bcy_xla_handler)(void* call_frame)
    bcy_xla_handler bcy_cuda_xla_handler(const char* operation)
    bcy_xla_handler bcy_cpu_xla_handler(const char* operation)
    int bcy_cpu_default_threads()
    const char* bcy_cpu_isa()


cdef extern from "baracuda/runtime.h" nogil:
    ctypedef struct bcy_device_info:
        char name[256]
        int32_t major
        int32_t minor
        int32_t multiprocessors

    int bcy_cuda_built()
    const char* bcy_cuda_architectures()
    int bcy_cuda_toolkit_version()
    int bcy_cuda_driver_version(int* version)
    int bcy_cuda_device_count(int* count)
    int bcy_cuda_device_info(int device, bcy_device_info* info)
    int bcy_cuda_has_kernels(int device)
    int bcy_cuda_get_device(int* device)
    int bcy_cuda_set_device(int device)
    int bcy_cuda_memory_info(int device, int64_t* free_bytes, int64_t* total_bytes)
    const char* bcy_cuda_error_name(int code)
    const char* bcy_cuda_error_text(int code)

    int bcy_cuda_stream_create(int device, int priority, void** stream)
    int bcy_cuda_stream_destroy(int device, void* stream)
    int bcy_cuda_stream_synchronize(int device, void* stream)
    int bcy_cuda_stream_query(int device, void* stream, int* done)
    int bcy_cuda_stream_wait(int device, void* stream, void* event)
    int bcy_cuda_stream_is_capturing(int device, void* stream, int* capturing)
    int bcy_cuda_stream_device(void* stream, int* device)
    int bcy_cuda_stream_priority(int device, void* stream, int* priority)
    int bcy_cuda_stream_priority_range(int device, int* least, int* greatest)

    int bcy_cuda_event_create(int device, int timing, void** event)
    int bcy_cuda_event_destroy(int device, void* event)
    int bcy_cuda_event_record(int device, void* event, void* stream)
    int bcy_cuda_event_synchronize(void* event)
    int bcy_cuda_event_query(void* event, int* done)
    int bcy_cuda_event_elapsed_ms(void* start, void* end, float* ms)

    int bcy_cuda_malloc(int device, int64_t bytes, void* stream, void** pointer)
    int bcy_cuda_free(int device, void* pointer, void* stream)
    int bcy_cuda_malloc_host(int64_t bytes, void** pointer)
    int bcy_cuda_free_host(void* pointer)
    int bcy_cuda_memcpy(int device, void* to, const void* source, int64_t bytes, void* stream)
    int bcy_cuda_memset(int device, void* to, int value, int64_t bytes, void* stream)
    int bcy_cuda_pointer_device(const void* pointer, int* device_type, int* device)
