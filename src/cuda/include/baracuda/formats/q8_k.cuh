// SPDX-License-Identifier: Apache-2.0
// Q8_K: d f32, int8[256], int16 sums of 16 (not read: ggml leaves them unwritten for zero blocks);
// value d q.
#pragma once

#include "baracuda/numeric.h"

namespace bcy {

struct Q8_K {
  static constexpr int kId = 15, kElements = 256, kBytes = 292, kAlignment = 4;
  static constexpr int kScaleElements = 32, kMinima = 0;
  static constexpr bool kUnsignedCodes = false;

  static BCY_INLINE uint32_t codes(const uint8_t* block, int group, int word) {
    return load32<kAlignment>(block + 4 + 32 * group + 4 * word);
  }
  static BCY_INLINE int shift(int) { return 0; }
  static BCY_INLINE float scale(const uint8_t* block, int) {
    return as_float(load32<kAlignment>(block));
  }
};

}  // namespace bcy
