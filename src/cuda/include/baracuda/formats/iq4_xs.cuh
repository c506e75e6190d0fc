// SPDX-License-Identifier: Apache-2.0
// IQ4_XS: d f16, scales_h u16, scales_l[4], qs[128]; per 32 elements d (ls - 32) table[q], ls of 6
// bits: the low four in nibble g of scales_l, the top two in bits 2 g of scales_h. Inside a group
// the nibbles lie as in IQ4_NL.
#pragma once

#include "baracuda/bytes.h"
#include "baracuda/formats/table16.cuh"
#include "baracuda/numeric.h"

namespace bcy {

struct IQ4_XS {
  static constexpr int kId = 23, kElements = 256, kBytes = 136, kAlignment = 2;
  static constexpr int kScaleElements = 32, kMinima = 0;
  static constexpr bool kUnsignedCodes = false;

  static BCY_INLINE constexpr Table16 table() { return iq4_table(); }
  template <class Block>
  static BCY_INLINE uint32_t nibbles(Block block, int group, int word) {
    return block.load32(8 + 16 * group, 4 * word);
  }
  template <class Block>
  static BCY_INLINE uint32_t codes(Block block, int group, int half, int word) {
    return look_up_nibbles(table(), nibbles(block, group, word), half);
  }
  static BCY_INLINE constexpr int shift(int) { return 0; }
  template <class Block>
  static BCY_INLINE float scale(Block block, int group) {
    return mul(block.load_half(0), byte_to_float(scales(block, group % 2), group / 2, 32));
  }
  // Those of the even or the odd groups, four bytes.
  template <class Block>
  static BCY_INLINE uint32_t scales(Block block, int odd) {
    const uint32_t low = block.load32(4, 0) >> 4 * odd;
    const uint32_t bits = block.load16(2);
    const uint32_t apart = (bits & 0x00ffu) | (bits & 0xff00u) << 8;
    const uint32_t nibbles = (apart | apart << 4) & 0x0f0f0f0fu;  // of two groups each
    return (low & 0x0f0f0f0fu) | (nibbles << (odd ? 2 : 4) & 0x30303030u);
  }
};

}  // namespace bcy
