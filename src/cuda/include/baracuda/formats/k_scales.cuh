// SPDX-License-Identifier: Apache-2.0
// The 6-bit scales and minima that Q4_K and Q5_K pack into 12 bytes from byte 4 on, eight of each:
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

}  // namespace bcy
