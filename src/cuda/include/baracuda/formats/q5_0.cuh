// SPDX-License-Identifier: Apache-2.0
// Q5_0: d f16, qh[4], qs[16]; value d (q - 16); q is the nibble as in Q4_0 plus 16 times bit j of
// qh.
#pragma once

#include "baracuda/numeric.h"

namespace bcy {

struct Q5_0 {
  static constexpr int kId = 6, kElements = 32, kBytes = 22, kAlignment = 2;
  static constexpr int kScaleElements = 32, kMinima = 0;
  static constexpr bool kUnsignedCodes = false;

  static BCY_INLINE uint32_t codes(const uint8_t* block, int, int word) {
    const uint32_t nibbles = load32<kAlignment>(block + 6 + 4 * (word & 3));
    const uint32_t high = spread_bits(load32<kAlignment>(block + 2) >> 4 * word);
    // q - 16 is the nibble when the high bit is set, else the nibble sign-extended from -16.
    return ((word < 4 ? nibbles : nibbles >> 4) & 0x0f0f0f0fu) | (high ^ 0x01010101u) * 0xf0u;
  }
  static BCY_INLINE int shift(int) { return 0; }
  static BCY_INLINE float scale(const uint8_t* block, int) { return load_half(block); }
};

}  // namespace bcy
