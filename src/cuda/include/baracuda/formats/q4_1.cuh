// SPDX-License-Identifier: Apache-2.0
// Q4_1: d f16, m f16, qs[16]; value d q + m; element j in the low nibble of qs[j], j + 16 in the
// high one.
#pragma once

#include "baracuda/numeric.h"

namespace bcy {

struct Q4_1 {
  static constexpr int kId = 3, kElements = 32, kBytes = 20, kAlignment = 2;
  static constexpr int kScaleElements = 32, kMinima = 1;
  static constexpr bool kUnsignedCodes = false;

  static BCY_INLINE uint32_t codes(const uint8_t* block, int, int word) {
    const uint32_t nibbles = load32<kAlignment>(block + 4 + 4 * (word & 3));
    return (word < 4 ? nibbles : nibbles >> 4) & 0x0f0f0f0fu;
  }
  static BCY_INLINE int shift(int) { return 0; }
  static BCY_INLINE float scale(const uint8_t* block, int) { return load_half(block); }
  static BCY_INLINE float minimum(const uint8_t* block, int, int) { return load_half(block + 2); }
};

}  // namespace bcy
