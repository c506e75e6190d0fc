// SPDX-License-Identifier: Apache-2.0
// Q5_1: d f16, m f16, qh[4], qs[16]; value d q + m; q is the nibble as in Q4_0 plus 16 times bit j
// of qh.
#pragma once

#include "baracuda/bytes.h"
#include "baracuda/numeric.h"

namespace bcy {

struct Q5_1 {
  static constexpr int kId = 7, kElements = 32, kBytes = 24, kAlignment = 2;
  static constexpr int kScaleElements = 32, kMinima = 1;
  static constexpr bool kUnsignedCodes = false;

  template <class Block>
  static BCY_INLINE uint32_t codes(Block block, int, int half, int word) {
    const uint32_t nibbles = block.load32(8, 4 * word);
    const uint32_t fifth = spread_bits<4>(block.load32(4, 0) >> (16 * half + 4 * word));
    return ((half ? nibbles >> 4 : nibbles) & 0x0f0f0f0fu) | fifth;
  }
  static BCY_INLINE constexpr int shift(int) { return 0; }
  template <class Block>
  static BCY_INLINE float scale(Block block, int) {
    return block.load_half(0);
  }
  template <class Block>
  static BCY_INLINE float minimum(Block block, int, int) {
    return block.load_half(2);
  }
};

}  // namespace bcy
