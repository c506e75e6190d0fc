// SPDX-License-Identifier: Apache-2.0
// A build without CUDA: every function of runtime.h and every CUDA operation of api.h says so.
#include "baracuda/api.h"
#include "baracuda/runtime.h"

extern "C" {

int bcy_cuda_built(void) { return 0; }
const char* bcy_cuda_architectures(void) { return ""; }
int bcy_cuda_toolkit_version(void) { return 0; }

int bcy_cuda_driver_version(int* version) {
  *version = 0;
  return BCY_ERROR_NO_CUDA;
}

int bcy_cuda_device_count(int* count) {
  *count = 0;
  return BCY_ERROR_NO_CUDA;
}

const char* bcy_cuda_error_name(int) { return "unknown"; }
const char* bcy_cuda_error_text(int) { return "unknown error"; }

int bcy_cuda_device_info(int, bcy_device_info*) { return BCY_ERROR_NO_CUDA; }
int bcy_cuda_has_kernels(int) { return BCY_ERROR_NO_CUDA; }
int bcy_cuda_get_device(int*) { return BCY_ERROR_NO_CUDA; }
int bcy_cuda_set_device(int) { return BCY_ERROR_NO_CUDA; }
int bcy_cuda_memory_info(int, int64_t*, int64_t*) { return BCY_ERROR_NO_CUDA; }

int bcy_cuda_stream_create(int, int, void**) { return BCY_ERROR_NO_CUDA; }
int bcy_cuda_stream_destroy(int, void*) { return BCY_ERROR_NO_CUDA; }
int bcy_cuda_stream_synchronize(int, void*) { return BCY_ERROR_NO_CUDA; }
int bcy_cuda_stream_query(int, void*, int*) { return BCY_ERROR_NO_CUDA; }
int bcy_cuda_stream_wait(int, void*, void*) { return BCY_ERROR_NO_CUDA; }
int bcy_cuda_stream_is_capturing(int, void*, int*) { return BCY_ERROR_NO_CUDA; }
int bcy_cuda_stream_device(void*, int*) { return BCY_ERROR_NO_CUDA; }
int bcy_cuda_stream_priority(int, void*, int*) { return BCY_ERROR_NO_CUDA; }
int bcy_cuda_stream_priority_range(int, int*, int*) { return BCY_ERROR_NO_CUDA; }

int bcy_cuda_event_create(int, int, void**) { return BCY_ERROR_NO_CUDA; }
int bcy_cuda_event_destroy(int, void*) { return BCY_ERROR_NO_CUDA; }
int bcy_cuda_event_record(int, void*, void*) { return BCY_ERROR_NO_CUDA; }
int bcy_cuda_event_synchronize(void*) { return BCY_ERROR_NO_CUDA; }
int bcy_cuda_event_query(void*, int*) { return BCY_ERROR_NO_CUDA; }
int bcy_cuda_event_elapsed_ms(void*, void*, float*) { return BCY_ERROR_NO_CUDA; }

int bcy_cuda_malloc(int, int64_t, void*, void**) { return BCY_ERROR_NO_CUDA; }
int bcy_cuda_free(int, void*, void*) { return BCY_ERROR_NO_CUDA; }
int bcy_cuda_malloc_host(int64_t, void**) { return BCY_ERROR_NO_CUDA; }
int bcy_cuda_free_host(void*) { return BCY_ERROR_NO_CUDA; }
int bcy_cuda_memcpy(int, void*, const void*, int64_t, void*) { return BCY_ERROR_NO_CUDA; }
int bcy_cuda_memset(int, void*, int, int64_t, void*) { return BCY_ERROR_NO_CUDA; }
int bcy_cuda_pointer_device(const void*, int*, int*) { return BCY_ERROR_NO_CUDA; }

int bcy_cuda_gguf_workspace_size(const bcy_gguf_matmul_args*, int64_t*) {
  return BCY_ERROR_NO_CUDA;
}
int bcy_cuda_gguf_needs_no_workspace(const bcy_gguf_matmul_args*, int32_t*) {
  return BCY_ERROR_NO_CUDA;
}
int bcy_cuda_gguf_dequantize(const bcy_gguf_dequantize_args*, void*) { return BCY_ERROR_NO_CUDA; }
int bcy_cuda_gguf_matvec(const bcy_gguf_matmul_args*, void*) { return BCY_ERROR_NO_CUDA; }
int bcy_cuda_gguf_stage(const bcy_gguf_matmul_args*, void*) { return BCY_ERROR_NO_CUDA; }
int bcy_cuda_gguf_matmul(const bcy_gguf_matmul_args*, void*) { return BCY_ERROR_NO_CUDA; }

int bcy_cuda_nf4_uses_tensor_cores(const bcy_nf4_matmul_args*, int32_t*) {
  return BCY_ERROR_NO_CUDA;
}
int bcy_cuda_nf4_workspace_size(const bcy_nf4_matmul_args*, int64_t*) { return BCY_ERROR_NO_CUDA; }
int bcy_cuda_nf4_matmul(const bcy_nf4_matmul_args*, void*) { return BCY_ERROR_NO_CUDA; }
int bcy_cuda_nf4_dequantize(const bcy_nf4_dequantize_args*, void*) { return BCY_ERROR_NO_CUDA; }
int bcy_cuda_nf4_quantize(const bcy_nf4_quantize_args*, void*) { return BCY_ERROR_NO_CUDA; }
int bcy_cuda_nf4_nest(const bcy_nf4_nest_args*, void*) { return BCY_ERROR_NO_CUDA; }

bcy_xla_handler bcy_cuda_xla_handler(const char*) { return nullptr; }

}  // extern "C"
