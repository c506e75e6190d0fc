// SPDX-License-Identifier: Apache-2.0
// y[n, k] = weight[n, k] as floats. Four threads share a unit: each gives eight values in a row, 16
// bytes of halves, of every group.
#pragma once

#include "baracuda/order.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/pack.cuh"
#include "cuda/common/ring.cuh"
#include "operations.h"

namespace bcy {

constexpr int kDequantizeThreads = 256;
constexpr int kDequantizeEach = 8;
constexpr int kUnitThreads = kGroup / kDequantizeEach;

// Alignment: of every unit of the weight.
template <class Format, class Y, int Alignment>
__global__ void __launch_bounds__(kDequantizeThreads)
    dequantize_kernel(const __grid_constant__ bcy_gguf_dequantize_args args, int64_t units) {
  using Storage = typename Y::Storage;
  constexpr int kBlockGroups = Format::kElements / kGroup;
  constexpr int kUnitBlocks = kUnitGroups / kBlockGroups;
  const int64_t index = (int64_t{blockIdx.x} * kDequantizeThreads + threadIdx.x) / kUnitThreads;
  if (index >= args.nrows * units) return;
  const int64_t row = index / units, unit = index % units;
  const int half = threadIdx.x % kUnitThreads / 2, word = threadIdx.x % 2 * 2;
  const int64_t blocks = args.ncols / Format::kElements;
  const Bytes<Alignment> bytes(static_cast<const uint8_t*>(args.weight) +
                               (row * blocks + unit * kUnitBlocks) * Format::kBytes);
  Storage* const y = static_cast<Storage*>(args.y) + row * args.y_stride + unit * kUnit +
                     threadIdx.x % kUnitThreads * kDequantizeEach;
  const bool vectors = reinterpret_cast<uintptr_t>(y) % 16 == 0;
  const int64_t left = (args.ncols - unit * kUnit) / kGroup;
  // All loads first: the compiler moves none of them ahead of a store.
  constexpr int kWords = kDequantizeEach * sizeof(Storage) / 4;
  constexpr int kInWord = 4 / sizeof(Storage);
  uint32_t words[kUnitGroups][kWords];
#pragma unroll
  for (int group = 0; group < kUnitGroups; ++group) {
    if (kBlockGroups == 1 && group >= left) break;
    const auto block = bytes + group / kBlockGroups * Format::kBytes;
    float values[kDequantizeEach];
    dequantize_word<Format>(block, group % kBlockGroups, half, word, values);
    dequantize_word<Format>(block, group % kBlockGroups, half, word + 1, values + 4);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      words[group][i] = pack<Y>(values + i * kInWord);
    }
  }
#pragma unroll
  for (int group = 0; group < kUnitGroups; ++group) {
    if (kBlockGroups == 1 && group >= left) return;
    Storage* const to = y + group * kGroup;
    if (vectors) {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        *reinterpret_cast<uint4*>(to + i * kInWord) = {words[group][i], words[group][i + 1],
                                                       words[group][i + 2], words[group][i + 3]};
      }
    } else {
#pragma unroll
      for (int i = 0; i < kDequantizeEach; ++i) {
        const uint32_t bits = words[group][i / kInWord] >> 32 / kInWord * (i % kInWord);
        if constexpr (sizeof(Storage) == 4) {
          to[i] = as_float(bits);
        } else {
          to[i] = Storage(bits);
        }
      }
    }
  }
}

template <class Format>
int GgufOperations<Format>::dequantize(const bcy_gguf_dequantize_args& args, cudaStream_t stream) {
  const int64_t units = ceil_div(args.ncols, kUnit);
  const int64_t blocks = ceil_div(args.nrows * units * kUnitThreads, kDequantizeThreads);
  if (blocks > kMaxGridX) return BCY_ERROR_TOO_LARGE;
  constexpr int kAligned = kUnitAlignment<Format>;
  const bool aligned = reinterpret_cast<uintptr_t>(args.weight) % kAligned == 0 &&
                       row_bytes<Format>(args.ncols) % kAligned == 0;
  return with_element(args.y_type, [&](auto y) {
    using Y = decltype(y);
    auto* kernel = aligned ? dequantize_kernel<Format, Y, kAligned>
                           : dequantize_kernel<Format, Y, Format::kAlignment>;
    return launch(kernel, dim3(unsigned(blocks)), dim3(kDequantizeThreads), stream, 0, false, args,
                  units);
  });
}

}  // namespace bcy
