// SPDX-License-Identifier: Apache-2.0
// The 6-bit scales and minima that Q4_K and Q5_K pack into 12 bytes, eight of each: groups 0 to 3
// in the low six bits of bytes 0-3 (scales) and 4-7 (minima); groups 4 to 7 with their low four
// bits in the nibbles of bytes 8-11 (scale low, minimum high) and their top two bits in the top
// bits of bytes 0-3 and 4-7.
#pragma once

#include "baracuda/numeric.h"

namespace bcy {

BCY_INLINE int k_scale(const uint8_t* packed, int group) {
  return group < 4 ? packed[group] & 63 : (packed[group + 4] & 15) | packed[group - 4] >> 6 << 4;
}

BCY_INLINE int k_minimum(const uint8_t* packed, int group) {
  return group < 4 ? packed[group + 4] & 63 : packed[group + 4] >> 4 | packed[group] >> 6 << 4;
}

}  // namespace bcy
