// SPDX-License-Identifier: Apache-2.0
// y[n, k] = weight[n, k] as floats. A thread gives eight values in a row: 16 bytes of halves.
#pragma once

#include "baracuda/order.cuh"
#include "launch.cuh"
#include "operations.h"

namespace bcy {

constexpr int kDequantizeThreads = 256;
constexpr int kDequantizeEach = 8;

template <class Format, class Y>
__global__ void __launch_bounds__(kDequantizeThreads)
    dequantize_kernel(const __grid_constant__ bcy_gguf_dequantize_args args) {
  using Storage = typename Y::Storage;
  struct alignas(16) Vector {
    Storage values[16 / sizeof(Storage)];
  };
  constexpr int kBlockParts = Format::kElements / kDequantizeEach;
  const int64_t row_parts = args.ncols / kDequantizeEach;
  const int64_t index = int64_t{blockIdx.x} * kDequantizeThreads + threadIdx.x;
  if (index >= args.nrows * row_parts) return;
  // Blocks follow each other without gaps, across rows too.
  const Bytes<Format::kAlignment> block(static_cast<const uint8_t*>(args.weight) +
                                        index / kBlockParts * Format::kBytes);
  const int part = int(index % kBlockParts);

  float values[kDequantizeEach];
  dequantize_word<Format>(block, part / 4, part / 2 % 2, part % 2 * 2, values);
  dequantize_word<Format>(block, part / 4, part / 2 % 2, part % 2 * 2 + 1, values + 4);
  alignas(16) Storage rounded[kDequantizeEach];
#pragma unroll
  for (int i = 0; i < kDequantizeEach; ++i) rounded[i] = Y::round(values[i]);
  const int64_t row = args.y_stride == args.ncols ? 0 : index / row_parts;
  Storage* const y =
      static_cast<Storage*>(args.y) + row * (args.y_stride - args.ncols) + index * kDequantizeEach;
  if (reinterpret_cast<uintptr_t>(y) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < int(sizeof rounded / 16); ++i) {
      reinterpret_cast<Vector*>(y)[i] = reinterpret_cast<const Vector*>(rounded)[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kDequantizeEach; ++i) y[i] = rounded[i];
  }
}

template <class Format>
int GgufOperations<Format>::dequantize(const bcy_gguf_dequantize_args& args, cudaStream_t stream) {
  const int64_t blocks = ceil_div(args.nrows * (args.ncols / kDequantizeEach), kDequantizeThreads);
  if (blocks > kMaxGridX) return BCY_ERROR_TOO_LARGE;
  return with_element(args.y_type, [&](auto y) {
    return launch(dequantize_kernel<Format, decltype(y)>, dim3(unsigned(blocks)),
                  dim3(kDequantizeThreads), stream, 0, false, args);
  });
}

}  // namespace bcy
