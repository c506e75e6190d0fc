// SPDX-License-Identifier: Apache-2.0
// Q5_1: d f16, m f16, qh[4], qs[16]; value d q + m; q is the nibble as in Q4_0 plus 16 times bit j
// of qh.
#pragma once

#include "baracuda/numeric.h"

namespace bcy {

struct Q5_1 {
  static constexpr int kId = 7, kElements = 32, kBytes = 24, kAlignment = 2;
  static constexpr int kScaleElements = 32, kMinima = 1;
  static constexpr bool kUnsignedCodes = false;

  static BCY_INLINE uint32_t codes(const uint8_t* block, int, int word) {
    const uint32_t nibbles = load32<kAlignment>(block + 8 + 4 * (word & 3));
    const uint32_t high = spread_bits(load32<kAlignment>(block + 4) >> 4 * word);
    return ((word < 4 ? nibbles : nibbles >> 4) & 0x0f0f0f0fu) | high * 0x10u;
  }
  static BCY_INLINE int shift(int) { return 0; }
  static BCY_INLINE float scale(const uint8_t* block, int) { return load_half(block); }
  static BCY_INLINE float minimum(const uint8_t* block, int, int) { return load_half(block + 2); }
};

}  // namespace bcy
