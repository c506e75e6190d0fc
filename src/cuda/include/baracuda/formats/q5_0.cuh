// SPDX-License-Identifier: Apache-2.0
// Q5_0: d f16, qh[4], qs[16]; value d (q - 16); q is the nibble as in Q4_0 plus 16 times bit j of
// qh.
#pragma once

#include "baracuda/bytes.h"
#include "baracuda/numeric.h"

namespace bcy {

struct Q5_0 {
  static constexpr int kId = 6, kElements = 32, kBytes = 22, kAlignment = 2;
  static constexpr int kScaleElements = 32, kMinima = 0;
  static constexpr bool kUnsignedCodes = false;

  // Five bits at the top of their byte, sign bit flipped, are 8 (q - 16) as int8.
  template <bool Signed = true, class Block>
  static BCY_INLINE uint32_t codes(Block block, int, int half, int word) {
    const uint32_t nibbles = block.load32(6, 4 * word);
    const uint32_t fifth = spread_bits<7>(block.load32(2, 0) >> (16 * half + 4 * word));
    const uint32_t low = half ? nibbles >> 1 : nibbles << 3;
    return mask_and_flip_if<Signed>(low, 0x78787878u, 0x80808080u) ^ fifth;
  }
  static BCY_INLINE constexpr int shift(int) { return 3; }
  template <class Block>
  static BCY_INLINE float scale(Block block, int) {
    return block.load_half(0);
  }
};

}  // namespace bcy
