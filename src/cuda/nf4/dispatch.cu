// SPDX-License-Identifier: Apache-2.0
// The C interface of the operations of 4-bit weights: checks what the kernels rely on.
#include "baracuda/nf4_weight.h"
#include "exact_sm90.cuh"
#include "matmul_sm90.cuh"
#include "operations.h"
#include "weight.cuh"

namespace bcy {

bool streams_rows(const bcy_nf4_matmul_args& args, const Device& device) {
  return device.arch >= 800 && args.weight.layout == BCY_BITSANDBYTES &&
         args.weight.ncols % Nf4Rows::kElements == 0 && args.weight.ncols > 0;
}

// What decides is the same for every M and address, so that the bits are, too.
bool uses_tensor_cores(const bcy_nf4_matmul_args& args, const Device& device) {
  return !args.exact && args.x_type != BCY_F32 && streams_rows(args, device);
}

}  // namespace bcy

using namespace bcy;

int bcy_cuda_nf4_uses_tensor_cores(const bcy_nf4_matmul_args* args, int32_t* answer) {
  *answer = 0;
  return on_device(args->device, [&](const Device& device) {
    *answer = uses_tensor_cores(*args, device);
    return int(BCY_OK);
  });
}

int bcy_cuda_nf4_workspace_size(const bcy_nf4_matmul_args* args, int64_t* size) {
  *size = 0;
  if (args->m == 0 || args->weight.nrows == 0) return BCY_OK;
  return on_device(args->device, [&](const Device& device) {
    if (streams_rows(*args, device)) {
      *size = uses_tensor_cores(*args, device)
                  ? divide_nf4(args->weight, args->m, device).meetings.bytes
                  : nf4_tables_workspace(args->weight, args->m, device);
    }
    return int(BCY_OK);
  });
}

int bcy_cuda_nf4_matmul(const bcy_nf4_matmul_args* args, void* stream) {
  if (const int status = check_weight(args->weight)) return status;
  if (args->m == 0 || args->weight.nrows == 0) return BCY_OK;
  return on_device(args->device, [&](const Device& device) {
    return with_element(args->x_type, [&](auto x) {
      return nf4_matmul<decltype(x)>(*args, device, static_cast<cudaStream_t>(stream));
    });
  });
}

int bcy_cuda_nf4_dequantize(const bcy_nf4_dequantize_args* args, void* stream) {
  if (const int status = check_weight(args->weight)) return status;
  if (args->weight.nrows == 0 || args->weight.ncols == 0) return BCY_OK;
  return on_device(args->device, [&](const Device&) {
    return nf4_dequantize(*args, static_cast<cudaStream_t>(stream));
  });
}

int bcy_cuda_nf4_quantize(const bcy_nf4_quantize_args* args, void* stream) {
  if (codebook_of(args->codebook) == nullptr) return BCY_ERROR_UNKNOWN_FORMAT;
  if (args->count < 0 || args->block_size < kGroup || !is_power_of_two(args->block_size)) {
    return BCY_ERROR_INVALID_ARGUMENT;
  }
  if (args->count == 0) return BCY_OK;
  return on_device(args->device, [&](const Device&) {
    return nf4_quantize(*args, static_cast<cudaStream_t>(stream));
  });
}

int bcy_cuda_nf4_nest(const bcy_nf4_nest_args* args, void* stream) {
  if (args->count < 0 || !is_power_of_two(args->nested_block)) return BCY_ERROR_INVALID_ARGUMENT;
  if (args->count == 0) return BCY_OK;
  return on_device(args->device, [&](const Device&) {
    return nf4_nest(*args, static_cast<cudaStream_t>(stream));
  });
}
