// SPDX-License-Identifier: Apache-2.0
// Results as the words they are stored in.
#pragma once

#include <type_traits>

#include "baracuda/numeric.h"

namespace bcy {

// Two values in one word, rounded by the hardware, whose NaN is 0x7fff in both types.
__device__ __forceinline__ uint32_t round_two(F16, float low, float high) {
  const __half2 two = __floats2half2_rn(low, high);
  uint32_t word;
  memcpy(&word, &two, sizeof word);
  return word;
}
__device__ __forceinline__ uint32_t round_two(BF16, float low, float high) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
  uint32_t word;
  memcpy(&word, &two, sizeof word);
  return word;
}

// One float32 or two of a type of 16 bits, rounded, as a word. The bits are Y::round's, in half the
// instructions.
template <class Y>
__device__ __forceinline__ uint32_t pack(const float* values) {
  if constexpr (sizeof(typename Y::Storage) == 4) {
    return as_bits(Y::round(values[0]));
  } else {
    const uint32_t word = round_two(Y{}, values[0], values[1]);
    // Bit 15 of a half that is NaN; then what takes 0x7fff to the one NaN of the type.
    const uint32_t nan = ((word & 0x7fff7fffu) + 0x00010001u) & 0x80008000u;
    return word - ((nan >> (std::is_same_v<Y, F16> ? 6 : 9)) - (nan >> 15));
  }
}

}  // namespace bcy
