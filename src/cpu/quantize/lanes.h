// SPDX-License-Identifier: Apache-2.0
// Four floats at a time in the compiler's own vector type: SSE2 and NEON registers without
// intrinsics. The lanes fix the order of every sum, so that a quantized tensor has the same bytes
// on every machine.
#pragma once

#include <cstring>

namespace bcy::quantize {

using Lanes = float __attribute__((vector_size(16)));
using Mask = int __attribute__((vector_size(16)));

inline Lanes splat(float value) { return Lanes{value, value, value, value}; }

inline Lanes load(const float* from) {
  Lanes lanes;
  memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

inline void store(float* to, Lanes lanes) { memcpy(to, &lanes, sizeof lanes); }

inline float total(Lanes v) { return (v[0] + v[2]) + (v[1] + v[3]); }

}  // namespace bcy::quantize
