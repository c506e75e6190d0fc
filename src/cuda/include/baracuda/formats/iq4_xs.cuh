// SPDX-License-Identifier: Apache-2.0
// IQ4_XS: d f16, scales_h u16, scales_l[4], qs[128]; per 32 elements d (ls - 32) table[q], ls of 6
// bits: the low four in nibble g of scales_l, the top two in bits 2 g of scales_h. Inside a group
// the nibbles lie as in IQ4_NL.
#pragma once

#include "baracuda/formats/table16.cuh"
#include "baracuda/numeric.h"

namespace bcy {

struct IQ4_XS {
  static constexpr int kId = 23, kElements = 256, kBytes = 136, kAlignment = 2;
  static constexpr int kScaleElements = 32, kMinima = 0;
  static constexpr bool kUnsignedCodes = false;

  static BCY_INLINE uint32_t codes(const uint8_t* block, int group, int word) {
    const uint32_t nibbles = load32<kAlignment>(block + 8 + 16 * group + 4 * (word & 3));
    return look_up(iq4_table(), (word < 4 ? nibbles : nibbles >> 4) & 0x0f0f0f0fu);
  }
  static BCY_INLINE int shift(int) { return 0; }
  static BCY_INLINE float scale(const uint8_t* block, int group) {
    const int low = block[4 + group / 2] >> 4 * (group & 1) & 15;
    const int high = int(load16<kAlignment>(block + 2) >> 2 * group & 3u);
    return mul(load_half(block), float((low | high << 4) - 32));
  }
};

}  // namespace bcy
