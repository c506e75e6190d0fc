// SPDX-License-Identifier: Apache-2.0
// Activations as the caller has them, four at a time.
#pragma once

#include "launch.cuh"

namespace bcy {

// Whether four elements from a multiple of four on can be loaded at once.
inline bool loads_four_at_once(const bcy_gguf_matmul_args& args) {
  const int four = args.x_type == BCY_F32 ? 16 : 8;
  return reinterpret_cast<uintptr_t>(args.x) % four == 0 && (args.m == 1 || args.x_stride % 4 == 0);
}

// Four elements from index i on. The type is known only at run time; the branch is the same for
// all.
template <class X>
__device__ __forceinline__ void load_four_as(const void* x, int64_t i, bool vectors, float* out) {
  using Storage = typename X::Storage;
  struct alignas(4 * sizeof(Storage)) Four {
    Storage values[4];
  };
  const Storage* const p = static_cast<const Storage*>(x) + i;
  Four four;
  if (vectors) {
    four = *reinterpret_cast<const Four*>(p);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) four.values[j] = p[j];
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) out[j] = X::load(&four.values[j]);
}

__device__ __forceinline__ void load_four(const void* x, int64_t i, int element, bool vectors,
                                          float* out) {
  switch (element) {
    case BCY_F32:
      return load_four_as<F32>(x, i, vectors, out);
    case BCY_F16:
      return load_four_as<F16>(x, i, vectors, out);
    default:
      return load_four_as<BF16>(x, i, vectors, out);
  }
}

}  // namespace bcy
