// SPDX-License-Identifier: Apache-2.0
// Q4_0: d f16, qs[16]; value d (q - 8); element j in the low nibble of qs[j], j + 16 in the high
// one.
#pragma once

#include "baracuda/bytes.h"
#include "baracuda/numeric.h"

namespace bcy {

struct Q4_0 {
  static constexpr int kId = 2, kElements = 32, kBytes = 18, kAlignment = 2;
  static constexpr int kScaleElements = 32, kMinima = 0;
  static constexpr bool kUnsignedCodes = false;

  // A nibble at the top of its byte, sign bit flipped, is 16 (q - 8) as int8.
  template <bool Signed = true, class Block>
  static BCY_INLINE uint32_t codes(Block block, int, int half, int word) {
    const uint32_t nibbles = block.load32(2, 4 * word);
    return mask_and_flip_if<Signed>(half ? nibbles : nibbles << 4, 0xf0f0f0f0u, 0x80808080u);
  }
  static BCY_INLINE constexpr int shift(int) { return 4; }
  template <class Block>
  static BCY_INLINE float scale(Block block, int) {
    return block.load_half(0);
  }
};

}  // namespace bcy
