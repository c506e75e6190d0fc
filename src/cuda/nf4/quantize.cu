// SPDX-License-Identifier: Apache-2.0
// Blocks of values to 4-bit codes, and of absmax to 8-bit ones: a warp each.
#include "baracuda/block_codes.h"
#include "operations.h"

namespace bcy {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

__device__ __forceinline__ uint32_t largest_in_warp(uint32_t magnitude) {
#pragma unroll
  for (int width = 16; width > 0; width /= 2) {
    magnitude = max(magnitude, __shfl_xor_sync(~0u, magnitude, width));
  }
  return magnitude;
}

template <class X>
__global__ void __launch_bounds__(kThreads)
    quantize_blocks(const __grid_constant__ bcy_nf4_quantize_args args,
                    const __grid_constant__ Codebook codebook, int64_t blocks) {
  const int64_t block = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (block >= blocks) return;
  const int lane = threadIdx.x % 32;
  const int64_t first = block * args.block_size;
  const int count = int(min(args.count - first, int64_t{args.block_size}));
  const auto* const x = static_cast<const typename X::Storage*>(args.x) + first;
  uint32_t largest = 0;
  for (int i = lane; i < count; i += 32) {
    largest = max(largest, as_bits(X::load(x + i)) & 0x7fffffffu);
  }
  const BlockAbsmax absmax(largest_in_warp(largest), count == args.block_size);
  if (lane == 0) args.absmax[block] = absmax.stored;
  auto* const codes = static_cast<uint8_t*>(args.codes) + first / 2;
  for (int i = lane * 2; i < count; i += 64) {
    // What an odd number of elements leaves free is the code of zero.
    const int second =
        i + 1 < count ? code_of(codebook, absmax.scale(X::load(x + i + 1))) : codebook.codes[7];
    codes[i / 2] = uint8_t(code_of(codebook, absmax.scale(X::load(x + i))) << 4 | second);
  }
}

__global__ void __launch_bounds__(kThreads)
    nest_blocks(const __grid_constant__ bcy_nf4_nest_args args, int64_t blocks) {
  __shared__ float middles[256];
  if (threadIdx.x < 255) {
    middles[threadIdx.x] =
        mul(add(args.nested_code[threadIdx.x], args.nested_code[threadIdx.x + 1]), 0.5f);
  }
  __syncthreads();
  const int64_t block = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (block >= blocks) return;
  const int lane = threadIdx.x % 32;
  const int64_t first = block * args.nested_block;
  const int count = int(min(args.count - first, int64_t{args.nested_block}));
  const auto value = [&](int i) { return add(args.absmax[first + i], -args.offset); };
  uint32_t largest = 0;
  for (int i = lane; i < count; i += 32) {
    const float x = value(i);
    if (!is_nan(x)) largest = max(largest, as_bits(x) & 0x7fffffffu);
  }
  const float absmax = as_float(largest_in_warp(largest));
  if (lane == 0) args.nested_absmax[block] = absmax;
  const float inverse = div(1.0f, absmax);
  for (int i = lane; i < count; i += 32) {
    static_cast<uint8_t*>(args.codes)[first + i] =
        absmax == 0.0f ? 0 : nested_code_of(middles, mul(value(i), inverse));
  }
}

}  // namespace

int nf4_quantize(const bcy_nf4_quantize_args& args, cudaStream_t stream) {
  const int64_t blocks = ceil_div(args.count, args.block_size);
  const int64_t grid = ceil_div(blocks, kWarps);
  if (grid > kMaxGridX) return BCY_ERROR_TOO_LARGE;
  return with_element(args.x_type, [&](auto x) {
    return launch(quantize_blocks<decltype(x)>, dim3(unsigned(grid)), dim3(kThreads), stream, 0,
                  false, args, *codebook_of(args.codebook), blocks);
  });
}

int nf4_nest(const bcy_nf4_nest_args& args, cudaStream_t stream) {
  const int64_t blocks = ceil_div(args.count, args.nested_block);
  const int64_t grid = ceil_div(blocks, kWarps);
  if (grid > kMaxGridX) return BCY_ERROR_TOO_LARGE;
  return launch(nest_blocks, dim3(unsigned(grid)), dim3(kThreads), stream, 0, false, args, blocks);
}

}  // namespace bcy
