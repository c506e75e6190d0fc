// SPDX-License-Identifier: Apache-2.0
// How bitsandbytes quantizes the values of a block, rounding for rounding.
#pragma once

#include "baracuda/codebooks.h"
#include "baracuda/numeric.h"

namespace bcy {

// What scales a block of 4-bit codes. A full block is multiplied by the inverse of its absmax; the
// last one, if it is short, is divided, and stores at least the smallest absmax.
struct BlockAbsmax {
  float stored;
  float divisor;
  float inverse;
  bool full;

  // largest: bits of the largest magnitude; their order is that of magnitudes, NaN above infinity.
  BCY_INLINE BlockAbsmax(uint32_t largest, bool is_full) : full(is_full) {
    constexpr float kSmallest = 1e-38f;
    stored = canonical(as_float(largest));
    divisor = stored < kSmallest ? kSmallest : stored;
    if (!full) stored = divisor;
    inverse = div(1.0f, divisor);
  }
  BCY_INLINE float scale(float x) const {
    const float scaled = full ? mul(x, inverse) : div(x, divisor);
    return scaled < -1.0f ? -1.0f : scaled > 1.0f ? 1.0f : scaled;
  }
};

// A tie takes the lower value; NaN, which is not at or below any threshold, the highest.
BCY_INLINE uint8_t code_of(const Codebook& codebook, float scaled) {
  int above = 0;
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int i = 0; i < 15; ++i) above += !(scaled <= codebook.thresholds[i]);
  return codebook.codes[above];
}

// The 8-bit code of an absmax less the offset, times the inverse of the largest magnitude of its
// block. A table of 65536 steps over [-1, 1] gives it, so that the step is what is compared with
// the middles of neighbouring values, not the value. NaN takes code 0.
BCY_INLINE uint8_t nested_code_of(const float* middles, float scaled) {
  constexpr float kLastStep = 65535.0f;
  if (is_nan(scaled)) return 0;
  const float clamped = scaled < -1.0f ? -1.0f : scaled > 1.0f ? 1.0f : scaled;
  const int step = int(fma(mul(add(clamped, 1.0f), 0.5f), kLastStep, 0.5f));
  const float value = add(div(mul(float(step), 2.0f), kLastStep), -1.0f);
  int code = 0;  // middles below the value, of 255
  for (int half = 128; half > 0; half /= 2) {
    if (middles[code + half - 1] < value) code += half;
  }
  return uint8_t(code);
}

}  // namespace bcy
