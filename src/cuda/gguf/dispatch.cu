// SPDX-License-Identifier: Apache-2.0
// The C interface of the GGUF operations: from a format's number to its kernels.
#include "baracuda/formats.h"
#include "cuda/common/launch.cuh"
#include "operations.h"
#include "staged.cuh"

namespace bcy {
namespace {

// Calls function(Format{}, Device) on the right device.
template <class Args, class Function>
int run(const Args* args, Function&& function) {
  return on_device(args->device, [&](const Device& device) {
    return with_format(args->format, int(BCY_ERROR_UNKNOWN_FORMAT), [&](auto format) {
      using Format = decltype(format);
      if (args->ncols % Format::kElements != 0) return int(BCY_ERROR_INVALID_ARGUMENT);
      return function(format, device);
    });
  });
}

bool is_empty(const bcy_gguf_matmul_args* args) { return args->m == 0 || args->nrows == 0; }

}  // namespace
}  // namespace bcy

using namespace bcy;

int bcy_cuda_gguf_workspace_size(const bcy_gguf_matmul_args* args, int64_t* size) {
  *size = 0;
  return run(args, [&](auto format, const Device& device) {
    *size = GgufOperations<decltype(format)>::workspace_size(*args, device);
    return int(BCY_OK);
  });
}

int bcy_cuda_gguf_needs_no_workspace(const bcy_gguf_matmul_args* args, int32_t* answer) {
  *answer = 0;
  return run(args, [&](auto format, const Device& device) {
    *answer = stages_inside<decltype(format)>(*args, device);
    return int(BCY_OK);
  });
}

int bcy_cuda_gguf_dequantize(const bcy_gguf_dequantize_args* args, void* stream) {
  if (args->nrows == 0 || args->ncols == 0) return BCY_OK;
  return run(args, [&](auto format, const Device&) {
    return GgufOperations<decltype(format)>::dequantize(*args, static_cast<cudaStream_t>(stream));
  });
}

int bcy_cuda_gguf_matvec(const bcy_gguf_matmul_args* args, void* stream) {
  if (is_empty(args)) return BCY_OK;
  return run(args, [&](auto format, const Device& device) {
    return GgufOperations<decltype(format)>::matvec(*args, device,
                                                    static_cast<cudaStream_t>(stream));
  });
}

int bcy_cuda_gguf_stage(const bcy_gguf_matmul_args* args, void* stream) {
  if (is_empty(args) || args->ncols == 0) return BCY_OK;
  return run(args, [&](auto format, const Device& device) {
    return GgufOperations<decltype(format)>::stage(*args, device,
                                                   static_cast<cudaStream_t>(stream));
  });
}

int bcy_cuda_gguf_matmul(const bcy_gguf_matmul_args* args, void* stream) {
  if (is_empty(args)) return BCY_OK;
  return run(args, [&](auto format, const Device& device) {
    return GgufOperations<decltype(format)>::matmul(*args, device,
                                                    static_cast<cudaStream_t>(stream));
  });
}
