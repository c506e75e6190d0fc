// SPDX-License-Identifier: Apache-2.0
// Results as the words they are stored in.
#pragma once

#include "baracuda/numeric.h"

namespace bcy {

// One float32 or two of a type of 16 bits, rounded, as a word.
template <class Y>
__device__ __forceinline__ uint32_t pack(const float* values) {
  if constexpr (sizeof(typename Y::Storage) == 4) {
    return as_bits(Y::round(values[0]));
  } else {
    return Y::round(values[0]) | uint32_t(Y::round(values[1])) << 16;
  }
}

}  // namespace bcy
