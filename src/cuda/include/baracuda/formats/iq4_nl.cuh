// SPDX-License-Identifier: Apache-2.0
// IQ4_NL: d f16, qs[16]; value d table[q]; element j in the low nibble of qs[j], j + 16 in the high
// one.
#pragma once

#include "baracuda/formats/table16.cuh"
#include "baracuda/numeric.h"

namespace bcy {

struct IQ4_NL {
  static constexpr int kId = 20, kElements = 32, kBytes = 18, kAlignment = 2;
  static constexpr int kScaleElements = 32, kMinima = 0;
  static constexpr bool kUnsignedCodes = false;

  static BCY_INLINE uint32_t codes(const uint8_t* block, int, int word) {
    const uint32_t nibbles = load32<kAlignment>(block + 2 + 4 * (word & 3));
    return look_up(iq4_table(), (word < 4 ? nibbles : nibbles >> 4) & 0x0f0f0f0fu);
  }
  static BCY_INLINE int shift(int) { return 0; }
  static BCY_INLINE float scale(const uint8_t* block, int) { return load_half(block); }
};

}  // namespace bcy
