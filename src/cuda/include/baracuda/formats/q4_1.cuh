// SPDX-License-Identifier: Apache-2.0
// Q4_1: d f16, m f16, qs[16]; value d q + m; element j in the low nibble of qs[j], j + 16 in the
// high one.
#pragma once

#include "baracuda/bytes.h"
#include "baracuda/numeric.h"

namespace bcy {

struct Q4_1 {
  static constexpr int kId = 3, kElements = 32, kBytes = 20, kAlignment = 2;
  static constexpr int kScaleElements = 32, kMinima = 1;
  static constexpr bool kUnsignedCodes = false;

  template <class Block>
  static BCY_INLINE uint32_t codes(Block block, int, int half, int word) {
    const uint32_t nibbles = block.load32(4, 4 * word);
    return (half ? nibbles >> 4 : nibbles) & 0x0f0f0f0fu;
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
