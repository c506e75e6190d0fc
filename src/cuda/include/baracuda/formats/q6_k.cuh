// SPDX-License-Identifier: Apache-2.0
// Q6_K: ql[128], qh[64], int8 scales[16], d f16 @208; per 16 elements d sc (q - 32), q of 6 bits.
// Element 128 h + 32 j + l: nibble j / 2 of ql[64 h + 32 (j % 2) + l], bits 2j, 2j + 1 of qh[32 h +
// l].
#pragma once

#include "baracuda/numeric.h"

namespace bcy {

struct Q6_K {
  static constexpr int kId = 14, kElements = 256, kBytes = 210, kAlignment = 2;
  static constexpr int kScaleElements = 16, kMinima = 0;
  static constexpr bool kUnsignedCodes = false;

  static BCY_INLINE uint32_t codes(const uint8_t* block, int group, int word) {
    const int h = group / 4, j = group & 3;
    const uint32_t low =
        load32<kAlignment>(block + 64 * h + 32 * (j & 1) + 4 * word) >> 4 * (j / 2);
    const uint32_t high = load32<kAlignment>(block + 128 + 32 * h + 4 * word) >> 2 * j;
    // q - 32 is the low five bits when the sixth is set, else those bits sign-extended from -32.
    return (low & 0x0f0f0f0fu) | (high & 0x01010101u) << 4 | (~high >> 1 & 0x01010101u) * 0xe0u;
  }
  static BCY_INLINE int shift(int) { return 0; }
  static BCY_INLINE float scale(const uint8_t* block, int) { return load_half(block + 208); }
  static BCY_INLINE int half_scale(const uint8_t* block, int group, int half) {
    return int8_t(block[192 + 2 * group + half]);
  }
};

}  // namespace bcy
