// SPDX-License-Identifier: Apache-2.0
// Q8_0: d f16, int8[32]; value d q.
#pragma once

#include "baracuda/numeric.h"

namespace bcy {

struct Q8_0 {
  static constexpr int kId = 8, kElements = 32, kBytes = 34, kAlignment = 2;
  static constexpr int kScaleElements = 32, kMinima = 0;
  static constexpr bool kUnsignedCodes = false;

  static BCY_INLINE uint32_t codes(const uint8_t* block, int, int word) {
    return load32<kAlignment>(block + 2 + 4 * word);
  }
  static BCY_INLINE int shift(int) { return 0; }
  static BCY_INLINE float scale(const uint8_t* block, int) { return load_half(block); }
};

}  // namespace bcy
