// SPDX-License-Identifier: Apache-2.0
// y[n, k] = weight[n, k] as floats.
#include "cuda/common/pack.cuh"
#include "lookup.cuh"
#include "operations.h"
#include "weight.cuh"

namespace bcy {
namespace {

constexpr int kThreads = 256;
constexpr int kEach = 4;  // words of eight codes, so that their loads wait together

__device__ __forceinline__ void share_values(float (&values)[16], const CodeWords& codes) {
  if (threadIdx.x < 16) values[threadIdx.x] = as_float(codes.words[threadIdx.x]);
  __syncthreads();
}

// The matrix as one row, in words; y and the codes lie on boundaries of 16 and 4 bytes.
template <class Y>
__global__ void __launch_bounds__(kThreads)
    dequantize_words(const __grid_constant__ bcy_nf4_dequantize_args args,
                     const __grid_constant__ Scales scales, const __grid_constant__ CodeWords codes,
                     int shift) {
  __shared__ float values[16];
  share_values(values, codes);
  const int64_t words = args.weight.nrows * args.weight.ncols / 8;
  const int64_t first = int64_t{blockIdx.x} * (kThreads * kEach) + threadIdx.x;
  uint32_t word[kEach];
  Scales::Loaded loaded[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t at = first + i * kThreads;
    if (at >= words) break;
    word[i] = static_cast<const uint32_t*>(args.weight.codes)[at];
    loaded[i] = scales.load(at * 8 >> shift);
  }
  constexpr int kInWord = 4 / sizeof(typename Y::Storage);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t at = first + i * kThreads;
    if (at >= words) return;
    const float scale = scales.decode(loaded[i]);
    float floats[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      floats[j] = mul(values[word[i] >> (j / 2 * 8 + (j % 2 == 0 ? 4 : 0)) & 15], scale);
    }
    uint4* const to = static_cast<uint4*>(args.y) + at * (2 / kInWord);
#pragma unroll
    for (int j = 0; j < 2 / kInWord; ++j) {
      const float* const four = floats + j * 4 * kInWord;
      to[j] = {pack<Y>(four), pack<Y>(four + kInWord), pack<Y>(four + 2 * kInWord),
               pack<Y>(four + 3 * kInWord)};
    }
  }
}

// Any layout, stride and address: a thread gives one element.
template <class Y>
__global__ void __launch_bounds__(kThreads)
    dequantize_elements(const __grid_constant__ bcy_nf4_dequantize_args args,
                        const __grid_constant__ Scales scales,
                        const __grid_constant__ CodeWords codes,
                        const __grid_constant__ Blocks blocks, int64_t row_blocks) {
  __shared__ float values[16];
  share_values(values, codes);
  const int64_t row = blockIdx.x / row_blocks;
  const int64_t k = blockIdx.x % row_blocks * kThreads + threadIdx.x;
  if (k >= args.weight.ncols) return;
  const int64_t element = row * args.weight.ncols + k;
  const auto* const bytes = static_cast<const uint8_t*>(args.weight.codes);
  const int byte = blocks.across ? bytes[element / 2] : bytes[row / 2 * args.weight.ncols + k];
  const bool high = blocks.across ? element % 2 == 0 : row % 2 == 1;
  static_cast<typename Y::Storage*>(args.y)[row * args.y_stride + k] =
      Y::round(mul(values[high ? byte >> 4 : byte & 15], scales[blocks(row, k)]));
}

}  // namespace

int nf4_dequantize(const bcy_nf4_dequantize_args& args, cudaStream_t stream) {
  const bcy_nf4_weight& weight = args.weight;
  const Scales scales(weight);
  const CodeWords codes = float_words(*codebook_of(weight.codebook));
  const bool words = weight.layout == BCY_BITSANDBYTES && weight.nrows * weight.ncols % 8 == 0 &&
                     (args.y_stride == weight.ncols || weight.nrows == 1) &&
                     reinterpret_cast<uintptr_t>(args.y) % 16 == 0 &&
                     reinterpret_cast<uintptr_t>(weight.codes) % 4 == 0;
  const int64_t row_blocks = ceil_div(weight.ncols, kThreads);
  const int64_t blocks = words ? ceil_div(weight.nrows * weight.ncols / 8, kThreads * kEach)
                               : weight.nrows * row_blocks;
  if (blocks > kMaxGridX || weight.ncols > kMaxColumns) return BCY_ERROR_TOO_LARGE;
  return with_element(args.y_type, [&](auto y) {
    using Y = decltype(y);
    const dim3 grid(unsigned(blocks), 1, 1), block(kThreads);
    if (words) {
      return launch(dequantize_words<Y>, grid, block, stream, 0, false, args, scales, codes,
                    log2_of(weight.block_size));
    }
    return launch(dequantize_elements<Y>, grid, block, stream, 0, false, args, scales, codes,
                  Blocks(weight), row_blocks);
  });
}

}  // namespace bcy
