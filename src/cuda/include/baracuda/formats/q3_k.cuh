// SPDX-License-Identifier: Apache-2.0
// Q3_K: hmask[32], qs[64], scales[12], d f16 @108; per 16 elements d (sc - 32) (q - 4), sc of 6
// bits, q of 3. Element 128 h + 32 j + l: low bits 2j, 2j + 1 of qs[32 h + l], high bit 4 h + j of
// hmask[l].
#pragma once

#include "baracuda/bytes.h"
#include "baracuda/numeric.h"

namespace bcy {

struct Q3_K {
  static constexpr int kId = 11, kElements = 256, kBytes = 110, kAlignment = 2;
  static constexpr int kScaleElements = 16, kMinima = 0;
  static constexpr bool kUnsignedCodes = false;

  // Three bits at the top of their byte, sign bit flipped, are 32 (q - 4) as int8.
  template <class Block>
  static BCY_INLINE uint32_t codes(Block block, int group, int half, int word) {
    const uint32_t low = block.load32(32 + 32 * (group / 4) + 16 * half, 4 * word);
    const uint32_t placed = group % 4 == 3 ? low >> 1 : low << (5 - 2 * (group % 4));
    const uint32_t high = block.load32(16 * half, 4 * word) << (7 - group);
    return mask_and_flip(placed, 0x60606060u, 0x80808080u) ^ (high & 0x80808080u);
  }
  static BCY_INLINE constexpr int shift(int) { return 5; }
  template <class Block>
  static BCY_INLINE uint32_t unsigned_codes(Block block, int group, int half, int word, int shift) {
    const uint32_t low = block.load32(32 + 32 * (group / 4) + 16 * half, 4 * word);
    const uint32_t high = block.load32(16 * half, 4 * word);
    return (move_bits(low, 2 * (group % 4), shift) & 0x03030303u << shift) |
           (move_bits(high, group, shift + 2) & 0x04040404u << shift);
  }
  template <class Block>
  static BCY_INLINE float scale(Block block, int) {
    return block.load_half(108);
  }
  // Scale i of 16: its low four bits in nibble i / 8 of byte i % 8, its top two in bits 2 (i / 4)
  // of byte 8 + i % 4.
  static constexpr int kHalfOffset = 32;
  template <class Block>
  static BCY_INLINE uint32_t half_scales(Block block, int group) {
    const int quarter = group / 2;
    const uint32_t low = block.load32(96 + quarter % 2 * 4, 0) >> 4 * (quarter / 2) & 0x0f0f0f0fu;
    const uint32_t top = block.load32(104, 0);
    const uint32_t high = quarter < 2 ? top << (4 - 2 * quarter) : top >> (2 * quarter - 4);
    return low | (high & 0x30303030u);
  }
};

}  // namespace bcy
