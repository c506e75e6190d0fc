// SPDX-License-Identifier: Apache-2.0
// Q5_K: d f16, dmin f16, scales[12], qh[32], qs[128]; per 32 elements d sc q - dmin m.
// The nibbles are those of Q4_K; bit g of qh[l] is the fifth bit of element l of group g.
#pragma once

#include "baracuda/formats/k_scales.cuh"
#include "baracuda/numeric.h"

namespace bcy {

struct Q5_K {
  static constexpr int kId = 13, kElements = 256, kBytes = 176, kAlignment = 2;
  static constexpr int kScaleElements = 32, kMinima = 1;
  static constexpr bool kUnsignedCodes = false;

  static BCY_INLINE uint32_t codes(const uint8_t* block, int group, int word) {
    const uint32_t low =
        load32<kAlignment>(block + 48 + 32 * (group / 2) + 4 * word) >> 4 * (group & 1);
    const uint32_t high = load32<kAlignment>(block + 16 + 4 * word) >> group;
    return (low & 0x0f0f0f0fu) | (high & 0x01010101u) << 4;
  }
  static BCY_INLINE int shift(int) { return 0; }
  static BCY_INLINE float scale(const uint8_t* block, int group) {
    return mul(load_half(block), float(k_scale(block + 4, group)));
  }
  static BCY_INLINE float minimum(const uint8_t* block, int group, int) {
    return -mul(load_half(block + 2), float(k_minimum(block + 4, group)));
  }
};

}  // namespace bcy
