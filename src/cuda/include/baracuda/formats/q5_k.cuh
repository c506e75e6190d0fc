// SPDX-License-Identifier: Apache-2.0
// Q5_K: d f16, dmin f16, scales[12], qh[32], qs[128]; per 32 elements d sc q - dmin m.
// The nibbles are those of Q4_K; bit g of qh[l] is the fifth bit of element l of group g.
#pragma once

#include "baracuda/formats/k_scales.cuh"

namespace bcy {

struct Q5_K : KScales {
  static constexpr int kId = 13, kElements = 256, kBytes = 176, kAlignment = 2;
  static constexpr bool kUnsignedCodes = false;

  template <class Block>
  static BCY_INLINE uint32_t codes(Block block, int group, int half, int word) {
    const uint32_t low =
        block.load32(48 + 32 * (group / 2) + 16 * half, 4 * word) >> 4 * (group & 1);
    const uint32_t packed = block.load32(16 + 16 * half, 4 * word);
    const uint32_t high = group < 4 ? packed << (4 - group) : packed >> (group - 4);
    return (low & 0x0f0f0f0fu) | (high & 0x10101010u);
  }
  static BCY_INLINE constexpr int shift(int) { return 0; }
};

}  // namespace bcy
