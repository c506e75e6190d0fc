// SPDX-License-Identifier: Apache-2.0
// IQ4_NL: d f16, qs[16]; value d table[q]; element j in the low nibble of qs[j], j + 16 in the high
// one.
#pragma once

#include "baracuda/bytes.h"
#include "baracuda/formats/table16.cuh"
#include "baracuda/numeric.h"

namespace bcy {

struct IQ4_NL {
  static constexpr int kId = 20, kElements = 32, kBytes = 18, kAlignment = 2;
  static constexpr int kScaleElements = 32, kMinima = 0;
  static constexpr bool kUnsignedCodes = false;

  static BCY_INLINE constexpr Table16 table() { return iq4_table(); }
  template <class Block>
  static BCY_INLINE uint32_t nibbles(Block block, int, int word) {
    return block.load32(2, 4 * word);
  }
  template <class Block>
  static BCY_INLINE uint32_t codes(Block block, int group, int half, int word) {
    return look_up_nibbles(table(), nibbles(block, group, word), half);
  }
  static BCY_INLINE constexpr int shift(int) { return 0; }
  template <class Block>
  static BCY_INLINE float scale(Block block, int) {
    return block.load_half(0);
  }
};

}  // namespace bcy
