// SPDX-License-Identifier: Apache-2.0
// Q4_0: d f16, qs[16]; value d (q - 8); element j in the low nibble of qs[j], j + 16 in the high
// one.
#pragma once

#include "baracuda/numeric.h"

namespace bcy {

struct Q4_0 {
  static constexpr int kId = 2, kElements = 32, kBytes = 18, kAlignment = 2;
  static constexpr int kScaleElements = 32, kMinima = 0;
  static constexpr bool kUnsignedCodes = false;

  // A nibble moved to the top of its byte, sign bit flipped, is 16 (q - 8) as int8.
  static BCY_INLINE uint32_t codes(const uint8_t* block, int, int word) {
    const uint32_t nibbles = load32<kAlignment>(block + 2 + 4 * (word & 3));
    return ((word < 4 ? nibbles << 4 : nibbles) & 0xf0f0f0f0u) ^ 0x80808080u;
  }
  static BCY_INLINE int shift(int) { return 4; }
  static BCY_INLINE float scale(const uint8_t* block, int) {
    return mul(load_half(block), 0.0625f);
  }
};

}  // namespace bcy
