// SPDX-License-Identifier: Apache-2.0
// How 4-bit weights lie, and what scales them.
#pragma once

#include "baracuda/codebooks.h"
#include "baracuda/order.cuh"
#include "cuda/common/async.cuh"
#include "cuda/common/launch.cuh"

namespace bcy {

// Rows of whole words in the bitsandbytes layout, as the rings take them: 64 elements in 32 bytes.
struct Nf4Rows {
  static constexpr int kElements = 64, kBytes = 32, kAlignment = 1;
};

inline int log2_of(int power_of_two) {
  int n = 0;
  while (int64_t{1} << n < power_of_two) ++n;
  return n;
}

// What one block's elements are multiplied by: absmax, or what decodes to it.
struct Scales {
  const void* absmax;
  const float* nested_absmax;
  const float* nested_code;
  float nested_offset;
  int nested_shift;

  explicit Scales(const bcy_nf4_weight& weight)
      : absmax(weight.absmax),
        nested_absmax(weight.nested_absmax),
        nested_code(weight.nested_code),
        nested_offset(weight.nested_offset),
        nested_shift(log2_of(weight.nested_block)) {}

  // As it is in memory, so that loads can be under way while other things are done.
  struct Loaded {
    uint32_t bits;
    float nested;
  };
  __device__ __forceinline__ Loaded load(int64_t block) const {
    if (nested_absmax == nullptr) return {static_cast<const uint32_t*>(absmax)[block], 0.0f};
    return {static_cast<const uint8_t*>(absmax)[block], nested_of(block)};
  }
  __device__ __forceinline__ float nested_of(int64_t block) const {
    return nested_absmax[block >> nested_shift];
  }
  __device__ __forceinline__ float decode(Loaded loaded) const {
    if (nested_absmax == nullptr) return as_float(loaded.bits);
    return decode(nested_code[loaded.bits], loaded.nested);
  }
  __device__ __forceinline__ float decode(float value, float nested) const {
    return add(mul(value, nested), nested_offset);
  }
  __device__ __forceinline__ float operator[](int64_t block) const { return decode(load(block)); }

  // The sectors of the L2 cache that blocks begin to end - 1 are in, one of every `step`.
  __device__ __forceinline__ void prefetch(int64_t begin, int64_t end, int lane, int step) const {
    constexpr int kSector = 32;
    const int bytes = nested_absmax == nullptr ? sizeof(float) : 1;
    const auto* const base = static_cast<const char*>(absmax);
    for (int64_t at = begin * bytes + lane * kSector; at < end * bytes; at += step * kSector) {
      prefetch_to_l2(base + at);
    }
  }
};

// Where the block of an element is: blocks run across the ends of rows in the bitsandbytes layout,
// and divide rows in the other.
struct Blocks {
  int64_t ncols;
  int64_t in_row;
  int size;
  int shift;
  bool across;

  explicit Blocks(const bcy_nf4_weight& weight)
      : ncols(weight.ncols),
        in_row(weight.ncols / weight.block_size),
        size(weight.block_size),
        shift(log2_of(weight.block_size)),
        across(weight.layout == BCY_BITSANDBYTES) {}

  // Of a column below 2^32.
  __device__ __forceinline__ int64_t operator()(int64_t row, int64_t column) const {
    return across ? (row * ncols + column) >> shift
                  : row * in_row + uint32_t(column) / uint32_t(size);
  }
};

}  // namespace bcy
