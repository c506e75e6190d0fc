// SPDX-License-Identifier: Apache-2.0
// A table in shared memory of what the two codes of a byte stand for. It lies there sixteen times,
// one for each lane of half a warp, so that look-ups of 8 bytes meet no bank conflicts.
#pragma once

#include <string.h>

#include "baracuda/codebooks.h"
#include "cuda/common/product.cuh"

namespace bcy {

constexpr int kTableCopies = 16;
constexpr int kTableStride = kTableCopies * int(sizeof(uint2));
constexpr int kTableBytes = 256 * kTableStride;

// What the sixteen codes stand for, 32 bits each.
struct CodeWords {
  uint32_t words[16];
};

// As float32.
inline CodeWords float_words(const Codebook& codebook) {
  CodeWords result;
  memcpy(result.words, codebook.values, sizeof result.words);
  return result;
}

// What codes are multiplied by before they are split, and scales divided by: FP4's thirds become
// exact, and two bfloat16 numbers miss NF4's codes by 5e-7 of their size, root mean square: the
// least of millions of factors tried; without one it is 3e-6.
template <class X>
float stretch(int32_t codebook) {
  if (codebook == BCY_FP4) return 1.5f;
  return std::is_same_v<X, BF16> ? 1.4375994205474854f : 1.0f;
}

// As two numbers of 16 bits, the larger in the low half, whose sum is the stretched value. Both
// have its sign, and neither is zero where it is not: so their products with an infinity have no
// NaN for a sum.
template <class X>
CodeWords split_words(const Codebook& codebook, float factor) {
  constexpr uint32_t kStep = std::is_same_v<X, F16> ? 1u << 13 : 1u << 16;
  CodeWords result;
  for (int i = 0; i < 16; ++i) {
    const float value = codebook.values[i] * factor;
    const uint32_t bits = as_bits(value);
    float high = as_float(bits & ~(kStep - 1));
    if (high != 0.0f && as_bits(high) == bits) high = as_float(bits - kStep);
    const float low = value - high;
    if constexpr (std::is_same_v<X, F16>) {
      result.words[i] = float_to_half(high) | uint32_t(float_to_half(low)) << 16;
    } else {
      result.words[i] = float_to_bfloat16(high) | uint32_t(float_to_bfloat16(low)) << 16;
    }
  }
  return result;
}

// What a byte's entry is made of: its first code is in the high nibble.
__device__ __forceinline__ uint2 pair_of_words(uint32_t first, uint32_t second) {
  return {first, second};
}
__device__ __forceinline__ uint2 pair_of_halves(uint32_t first, uint32_t second) {
  return {__byte_perm(first, second, 0x5410), __byte_perm(first, second, 0x7632)};
}

// By the first Threads threads of a block, a multiple of 256.
template <int Threads, class Pair>
__device__ __forceinline__ void fill_table(uint8_t* table, const CodeWords& codes, Pair pair) {
  const int byte = threadIdx.x % 256;
  constexpr int kEach = kTableCopies * 256 / Threads;
  const uint2 entry = pair(codes.words[byte / 16], codes.words[byte % 16]);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int copy = (threadIdx.x / 256 * kEach + i + threadIdx.x) % kTableCopies;
    *reinterpret_cast<uint2*>(table + byte * kTableStride + copy * sizeof(uint2)) = entry;
  }
}

// This lane's copy.
class Table {
 public:
  __device__ __forceinline__ explicit Table(const uint8_t* table)
      : copy_(shared_address(table) + threadIdx.x % kTableCopies * uint32_t(sizeof(uint2))) {}
  // Of byte i of a word.
  __device__ __forceinline__ uint2 operator()(uint32_t word, int i) const {
    return load_shared(copy_ + byte_of(word, i) * kTableStride);
  }

 private:
  uint32_t copy_;  // a shared address: generic ones take an addition more
};

}  // namespace bcy
