// SPDX-License-Identifier: Apache-2.0
// Q3_K: hmask[32], qs[64], scales[12], d f16 @108; per 16 elements d (sc - 32) (q - 4), sc of 6
// bits, q of 3. Element 128 h + 32 j + l: low bits 2j, 2j + 1 of qs[32 h + l], high bit 4 h + j of
// hmask[l].
#pragma once

#include "baracuda/numeric.h"

namespace bcy {

struct Q3_K {
  static constexpr int kId = 11, kElements = 256, kBytes = 110, kAlignment = 2;
  static constexpr int kScaleElements = 16, kMinima = 0;
  static constexpr bool kUnsignedCodes = false;

  static BCY_INLINE uint32_t codes(const uint8_t* block, int group, int word) {
    const uint32_t low =
        load32<kAlignment>(block + 32 + 32 * (group / 4) + 4 * word) >> 2 * (group & 3);
    const uint32_t high = load32<kAlignment>(block + 4 * word) >> group;
    // q - 4 is the low bits when the high bit is set, else the low bits sign-extended from -4.
    return (low & 0x03030303u) | (~high & 0x01010101u) * 0xfcu;
  }
  static BCY_INLINE int shift(int) { return 0; }
  static BCY_INLINE float scale(const uint8_t* block, int) { return load_half(block + 108); }
  static BCY_INLINE int half_scale(const uint8_t* block, int group, int half) {
    const int i = 2 * group + half;
    const int low = block[96 + i % 8] >> 4 * (i / 8) & 15;
    const int high = block[104 + i % 4] >> 2 * (i / 4) & 3;
    return (low | high << 4) - 32;
  }
};

}  // namespace bcy
