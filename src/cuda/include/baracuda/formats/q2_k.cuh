// SPDX-License-Identifier: Apache-2.0
// Q2_K: scales[16], qs[64], d f16 @80, dmin f16 @82; per 16 elements d (sc & 15) q - dmin (sc >>
// 4). Element 128 h + 32 j + l is bits 2j, 2j + 1 of qs[32 h + l].
#pragma once

#include "baracuda/numeric.h"

namespace bcy {

struct Q2_K {
  static constexpr int kId = 10, kElements = 256, kBytes = 84, kAlignment = 2;
  static constexpr int kScaleElements = 16, kMinima = 2;
  static constexpr bool kUnsignedCodes = true;

  // The two bits stay where they are in their byte: a code is 4^j q.
  static BCY_INLINE uint32_t codes(const uint8_t* block, int group, int word) {
    return load32<kAlignment>(block + 16 + 32 * (group / 4) + 4 * word) & 0x03030303u
                                                                              << shift(group);
  }
  static BCY_INLINE int shift(int group) { return 2 * (group & 3); }
  static BCY_INLINE float scale(const uint8_t* block, int group) {
    return mul(load_half(block + 80), as_float(uint32_t(127 - shift(group)) << 23));
  }
  static BCY_INLINE int half_scale(const uint8_t* block, int group, int half) {
    return block[2 * group + half] & 15;
  }
  static BCY_INLINE float minimum(const uint8_t* block, int group, int half) {
    return -mul(load_half(block + 82), float(block[2 * group + half] >> 4));
  }
};

}  // namespace bcy
