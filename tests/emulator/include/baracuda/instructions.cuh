// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda_runtime.h"

namespace bcy {

inline void stay_branch() {}

inline uint32_t mask_and_flip_words(uint32_t x, uint32_t mask, uint32_t flip) {
  return (x & mask) ^ flip;
}

inline uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) { return a * b + c; }

inline uint32_t permute_or_fill(uint32_t low, uint32_t high, uint32_t select) {
  const uint32_t picked = __byte_perm(low, high, select);
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t byte = picked >> 8 * i & 0xff;
    const uint32_t fill = byte & 0x80 ? 0xff : 0;
    result |= (select >> 4 * i & 8 ? fill : byte) << 8 * i;
  }
  return result;
}

template <bool UnsignedCodes, bool UnsignedX = false>
inline int dot_of_four(uint32_t codes, uint32_t x, int sum) {
  for (int i = 0; i < 4; ++i) {
    const uint8_t code = uint8_t(codes >> 8 * i), of_x = uint8_t(x >> 8 * i);
    sum += (UnsignedCodes ? code : int8_t(code)) * (UnsignedX ? of_x : int8_t(of_x));
  }
  return sum;
}

template <class T>
inline void keep_in_register(T&) {}

}  // namespace bcy
