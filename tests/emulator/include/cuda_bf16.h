// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat162 {
  uint16_t x, y;
};

// As the hardware rounds two: to nearest, ties to even, every NaN 0x7fff.
inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
  uint16_t halves[2];
  const float values[2] = {low, high};
  for (int i = 0; i < 2; ++i) {
    uint32_t bits;
    memcpy(&bits, &values[i], sizeof bits);
    halves[i] =
        values[i] != values[i] ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  return {halves[0], halves[1]};
}
