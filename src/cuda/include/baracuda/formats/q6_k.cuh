// SPDX-License-Identifier: Apache-2.0
// Q6_K: ql[128], qh[64], int8 scales[16], d f16 @208; per 16 elements d sc (q - 32), q of 6 bits.
// Element 128 h + 32 j + l: nibble j / 2 of ql[64 h + 32 (j % 2) + l], bits 2j, 2j + 1 of qh[32 h +
// l].
#pragma once

#include "baracuda/bytes.h"
#include "baracuda/numeric.h"

namespace bcy {

struct Q6_K {
  static constexpr int kId = 14, kElements = 256, kBytes = 210, kAlignment = 2;
  static constexpr int kScaleElements = 16, kMinima = 0;
  static constexpr bool kUnsignedCodes = false;

  // Six bits at the top of their byte, sign bit flipped, are 4 (q - 32) as int8.
  template <class Block>
  static BCY_INLINE uint32_t codes(Block block, int group, int half, int word) {
    const int h = group / 4, j = group % 4;
    const uint32_t nibbles = block.load32(64 * h + 32 * (j % 2) + 16 * half, 4 * word);
    const uint32_t packed = block.load32(128 + 32 * h + 16 * half, 4 * word);
    const uint32_t low = j < 2 ? nibbles << 2 : nibbles >> 2;
    const uint32_t high = packed << (6 - 2 * j);
    return mask_and_flip(low, 0x3c3c3c3cu, 0x80808080u) ^ (high & 0xc0c0c0c0u);
  }
  static BCY_INLINE constexpr int shift(int) { return 2; }
  template <class Block>
  static BCY_INLINE float scale(Block block, int) {
    return block.load_half(208);
  }
  static constexpr int kHalfOffset = 128;
  template <class Block>
  static BCY_INLINE uint32_t half_scales(Block block, int group) {
    return block.load32(192 + group / 2 * 4, 0) ^ 0x80808080u;
  }
};

}  // namespace bcy
