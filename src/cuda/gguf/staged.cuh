// SPDX-License-Identifier: Apache-2.0
// How staged activations lie in the workspace: a plane of int8, then planes of float32, each 256-byte aligned.
#pragma once

#include "baracuda/order.cuh"

namespace bcy {

struct Staged {
  int8_t* codes;    // [m][ncols]
  float* scales;    // [m][ncols / 32]: d_a
  float* sums;      // [m][ncols / 32 * minima]: d_a * (sum of u over what the minimum covers)
};

constexpr int64_t align_plane(int64_t bytes) { return (bytes + 255) & ~int64_t{255}; }

inline Staged staged_planes(void* workspace, int64_t ncols, int64_t m) {
  const int64_t groups = ncols / kGroup;
  int8_t* codes = static_cast<int8_t*>(workspace);
  int8_t* scales = codes + align_plane(m * ncols);
  int8_t* sums = scales + align_plane(m * groups * int64_t{sizeof(float)});
  return {codes, reinterpret_cast<float*>(scales), reinterpret_cast<float*>(sums)};
}

inline int64_t staged_bytes(int64_t ncols, int64_t m, int minima) {
  // At most 1 + 12 / 32 bytes an element and the alignment of three planes.
  if (m != 0 && ncols > (INT64_MAX - 768) / 2 / m) return -1;
  const int64_t floats = m * (ncols / kGroup) * int64_t{sizeof(float)};
  return align_plane(m * ncols) + align_plane(floats) + align_plane(floats * minima);
}

}  // namespace bcy
