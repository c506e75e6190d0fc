// SPDX-License-Identifier: Apache-2.0
// Q8_0: d f16, int8[32]; value d q.
#pragma once

#include "baracuda/bytes.h"
#include "baracuda/numeric.h"

namespace bcy {

struct Q8_0 {
  static constexpr int kId = 8, kElements = 32, kBytes = 34, kAlignment = 2;
  static constexpr int kScaleElements = 32, kMinima = 0;
  static constexpr bool kUnsignedCodes = false;

  template <class Block>
  static BCY_INLINE uint32_t codes(Block block, int, int half, int word) {
    return block.load32(2 + 16 * half, 4 * word);
  }
  static BCY_INLINE constexpr int shift(int) { return 0; }
  template <class Block>
  static BCY_INLINE float scale(Block block, int) {
    return block.load_half(0);
  }
};

}  // namespace bcy
