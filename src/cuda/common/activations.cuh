// SPDX-License-Identifier: Apache-2.0
// Activations as the caller has them, four at a time.
#pragma once

#include <type_traits>

#include "cuda/common/launch.cuh"

namespace bcy {

// Whether `count` elements from a multiple of it on, 16 bytes or less, can be loaded at once.
inline bool loads_at_once(const ProductArgs& args, int count) {
  const int bytes = count * (args.x_type == BCY_F32 ? 4 : 2);
  return reinterpret_cast<uintptr_t>(args.x) % bytes == 0 &&
         (args.m == 1 || args.x_stride % count == 0);
}

// Two halves or bfloat16 of a word.
template <class X>
__device__ __forceinline__ void widen_two(uint32_t two, float* out) {
  if constexpr (std::is_same_v<X, F16>) {
    const float2 floats = __half22float2(*reinterpret_cast<const __half2*>(&two));
    out[0] = floats.x;
    out[1] = floats.y;
  } else {
    out[0] = as_float(two << 16);
    out[1] = as_float(two & 0xffff0000u);
  }
}

template <class X>
__device__ __forceinline__ void load_four(const typename X::Storage* x, bool at_once, float* out) {
  if (!at_once) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = X::load(x + i);
  } else if constexpr (std::is_same_v<X, F32>) {
    const float4 four = *reinterpret_cast<const float4*>(x);
    out[0] = four.x;
    out[1] = four.y;
    out[2] = four.z;
    out[3] = four.w;
  } else {
    const uint2 four = *reinterpret_cast<const uint2*>(x);
    widen_two<X>(four.x, out);
    widen_two<X>(four.y, out + 2);
  }
}

}  // namespace bcy
