// SPDX-License-Identifier: Apache-2.0
// Q4_K: d f16, dmin f16, scales[12], qs[128]; per 32 elements d sc q - dmin m.
// Groups 2 j and 2 j + 1 are the low and the high nibbles of qs[32 j .. 32 j + 31].
#pragma once

#include "baracuda/formats/k_scales.cuh"
#include "baracuda/numeric.h"

namespace bcy {

struct Q4_K {
  static constexpr int kId = 12, kElements = 256, kBytes = 144, kAlignment = 2;
  static constexpr int kScaleElements = 32, kMinima = 1;
  static constexpr bool kUnsignedCodes = true;

  // High nibbles stay where they are in their byte: the codes of odd groups are 16 q.
  static BCY_INLINE uint32_t codes(const uint8_t* block, int group, int word) {
    return load32<kAlignment>(block + 16 + 32 * (group / 2) + 4 * word) & 0x0f0f0f0fu
                                                                              << shift(group);
  }
  static BCY_INLINE int shift(int group) { return 4 * (group & 1); }
  static BCY_INLINE float scale(const uint8_t* block, int group) {
    const float unit = group & 1 ? 0.0625f : 1.0f;
    return mul(mul(load_half(block), float(k_scale(block + 4, group))), unit);
  }
  static BCY_INLINE float minimum(const uint8_t* block, int group, int) {
    return -mul(load_half(block + 2), float(k_minimum(block + 4, group)));
  }
};

}  // namespace bcy
