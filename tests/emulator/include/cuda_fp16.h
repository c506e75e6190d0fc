// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda_runtime.h"

struct __half {
  _Float16 value;
};
struct __half2 {
  _Float16 x, y;
};

inline __half __ushort_as_half(uint16_t bits) {
  __half h;
  memcpy(&h, &bits, sizeof h);
  return h;
}
inline uint16_t __half_as_ushort(__half h) {
  uint16_t bits;
  memcpy(&bits, &h, sizeof bits);
  return bits;
}
inline float __half2float(__half h) { return float(h.value); }
inline __half __float2half_rn(float x) { return {_Float16(x)}; }
inline float2 __half22float2(__half2 h) { return {float(h.x), float(h.y)}; }

// As the hardware rounds two: every NaN is 0x7fff.
inline __half2 __floats2half2_rn(float low, float high) {
  uint16_t bits[2];
  const float values[2] = {low, high};
  for (int i = 0; i < 2; ++i) {
    bits[i] = values[i] != values[i] ? 0x7fff : __half_as_ushort(__float2half_rn(values[i]));
  }
  __half2 two;
  memcpy(&two, bits, sizeof two);
  return two;
}
