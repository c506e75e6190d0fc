// SPDX-License-Identifier: Apache-2.0
// Q2_K: scales[16], qs[64], d f16 @80, dmin f16 @82; per 16 elements d (sc & 15) q - dmin (sc >>
// 4). Element 128 h + 32 j + l is bits 2j, 2j + 1 of qs[32 h + l].
#pragma once

#include "baracuda/bytes.h"
#include "baracuda/numeric.h"

namespace bcy {

struct Q2_K {
  static constexpr int kId = 10, kElements = 256, kBytes = 84, kAlignment = 2;
  static constexpr int kScaleElements = 16, kMinima = 2;
  static constexpr bool kUnsignedCodes = true;

  // The two bits stay where they are in their byte: a code is 4^j q.
  template <class Block>
  static BCY_INLINE uint32_t codes(Block block, int group, int half, int word) {
    return unsigned_codes(block, group, half, word, shift(group));
  }
  static BCY_INLINE constexpr int shift(int group) { return 2 * (group & 3); }
  template <class Block>
  static BCY_INLINE uint32_t unsigned_codes(Block block, int group, int half, int word, int shift) {
    const uint32_t packed = block.load32(16 + 32 * (group / 4) + 16 * half, 4 * word);
    return move_bits(packed, 2 * (group % 4), shift) & 0x03030303u << shift;
  }
  template <class Block>
  static BCY_INLINE float scale(Block block, int) {
    return block.load_half(80);
  }
  static constexpr int kHalfOffset = 0;
  template <class Block>
  static BCY_INLINE uint32_t half_scales(Block block, int group) {
    return block.load32(group / 2 * 4, 0) & 0x0f0f0f0fu;
  }
  template <class Block>
  static BCY_INLINE uint32_t minima(Block block, int word) {
    return block.load32(0, 4 * word) >> 4 & 0x0f0f0f0fu;
  }
  template <class Block>
  static BCY_INLINE float minimum_scale(Block block) {
    return -block.load_half(82);
  }
  template <class Block>
  static BCY_INLINE float minimum(Block block, int group, int half) {
    return mul(minimum_scale(block),
               byte_to_float(minima(block, group / 2), 2 * (group % 2) + half));
  }
};

}  // namespace bcy
