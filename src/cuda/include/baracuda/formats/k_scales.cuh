// SPDX-License-Identifier: Apache-2.0
// What Q4_K and Q5_K begin with: d f16, dmin f16, and eight 6-bit scales and minima in 12 bytes:
// groups 0 to 3 in the low six bits of bytes 0-3 (scales) and 4-7 (minima); groups 4 to 7 with
// their low four bits in the nibbles of bytes 8-11 (scale low, minimum high) and their top two bits
// in the top bits of bytes 0-3 and 4-7.
#pragma once

#include "baracuda/bytes.h"
#include "baracuda/numeric.h"

namespace bcy {

// Scale of group g in byte g % 4: four at a time, so that a kernel that takes all groups unpacks
// each word once.
template <class Block>
BCY_INLINE uint32_t k_scales(Block block, int group) {
  const uint32_t low = block.load32(4, 0);
  if (group < 4) return low & 0x3f3f3f3fu;
  return (block.load32(12, 0) & 0x0f0f0f0fu) | (low >> 2 & 0x30303030u);
}

template <class Block>
BCY_INLINE uint32_t k_minima(Block block, int group) {
  const uint32_t low = block.load32(8, 0);
  if (group < 4) return low & 0x3f3f3f3fu;
  return (block.load32(12, 0) >> 4 & 0x0f0f0f0fu) | (low >> 2 & 0x30303030u);
}

struct KScales {
  static constexpr int kScaleElements = 32, kMinima = 1;

  template <class Block>
  static BCY_INLINE float scale(Block block, int group) {
    return mul(block.load_half(0), byte_to_float(k_scales(block, group), group % 4));
  }
  template <class Block>
  static BCY_INLINE uint32_t minima(Block block, int word) {
    return k_minima(block, 4 * word);
  }
  template <class Block>
  static BCY_INLINE float minimum_scale(Block block) {
    return -block.load_half(2);
  }
  template <class Block>
  static BCY_INLINE float minimum(Block block, int group, int) {
    return mul(minimum_scale(block), byte_to_float(minima(block, group / 4), group % 4));
  }
};

}  // namespace bcy
