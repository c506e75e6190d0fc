// SPDX-License-Identifier: Apache-2.0
// Q4_K: d f16, dmin f16, scales[12], qs[128]; per 32 elements d sc q - dmin m.
// Groups 2 j and 2 j + 1 are the low and the high nibbles of qs[32 j .. 32 j + 31].
#pragma once

#include "baracuda/formats/k_scales.cuh"

namespace bcy {

struct Q4_K : KScales {
  static constexpr int kId = 12, kElements = 256, kBytes = 144, kAlignment = 2;
  static constexpr bool kUnsignedCodes = true;

  // High nibbles stay where they are in their byte: the codes of odd groups are 16 q.
  template <class Block>
  static BCY_INLINE uint32_t codes(Block block, int group, int half, int word) {
    return block.load32(16 + 32 * (group / 2) + 16 * half, 4 * word) & 0x0f0f0f0fu << shift(group);
  }
  static BCY_INLINE constexpr int shift(int group) { return 4 * (group & 1); }
};

}  // namespace bcy
