// SPDX-License-Identifier: Apache-2.0
// Q8_K: d f32, int8[256], int16 sums of 16 (not read: ggml leaves them unwritten for zero blocks);
// value d q.
#pragma once

#include "baracuda/bytes.h"
#include "baracuda/numeric.h"

namespace bcy {

struct Q8_K {
  static constexpr int kId = 15, kElements = 256, kBytes = 292, kAlignment = 4;
  static constexpr int kScaleElements = 32, kMinima = 0;
  static constexpr bool kUnsignedCodes = false;

  template <class Block>
  static BCY_INLINE uint32_t codes(Block block, int group, int half, int word) {
    return block.load32(4 + 32 * group + 16 * half, 4 * word);
  }
  static BCY_INLINE constexpr int shift(int) { return 0; }
  template <class Block>
  static BCY_INLINE float scale(Block block, int) {
    return as_float(block.load32(0, 0));
  }
};

}  // namespace bcy
