// SPDX-License-Identifier: Apache-2.0
// y[n, k] = weight[n, k] as floats. A thread gives the four values of one word.
#pragma once

#include "baracuda/order.cuh"
#include "launch.cuh"
#include "operations.h"

namespace bcy {

constexpr int kDequantizeThreads = 256;

template <class Format, class Y>
__global__ void __launch_bounds__(kDequantizeThreads)
    dequantize_kernel(const __grid_constant__ bcy_gguf_dequantize_args args) {
  using Storage = typename Y::Storage;
  struct alignas(4 * sizeof(Storage)) Four {
    Storage values[4];
  };
  constexpr int kBlockWords = Format::kElements / 4;
  const int64_t row_words = args.ncols / 4;
  const int64_t index = int64_t{blockIdx.x} * kDequantizeThreads + threadIdx.x;
  if (index >= args.nrows * row_words) return;
  const int64_t row = index / row_words;
  const int64_t word = index % row_words;
  // Blocks follow each other without gaps, across rows too.
  const uint8_t* block =
      static_cast<const uint8_t*>(args.weight) + index / kBlockWords * Format::kBytes;
  const int in_block = int(index % kBlockWords);

  float values[4];
  dequantize_word<Format>(block, in_block / 8, in_block % 8, values);
  Four rounded;
#pragma unroll
  for (int i = 0; i < 4; ++i) rounded.values[i] = Y::round(values[i]);
  Storage* y = static_cast<Storage*>(args.y) + row * args.y_stride + 4 * word;
  if (reinterpret_cast<uintptr_t>(y) % sizeof(Four) == 0) {
    *reinterpret_cast<Four*>(y) = rounded;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] = rounded.values[i];
  }
}

template <class Format>
int GgufOperations<Format>::dequantize(const bcy_gguf_dequantize_args& args, cudaStream_t stream) {
  const int64_t blocks = ceil_div(args.nrows * (args.ncols / 4), kDequantizeThreads);
  if (blocks > kMaxGridX) return BCY_ERROR_TOO_LARGE;
  return with_element(args.y_type, [&](auto y) {
    return launch(dequantize_kernel<Format, decltype(y)>, dim3(unsigned(blocks)),
                  dim3(kDequantizeThreads), stream, 0, args);
  });
}

}  // namespace bcy
