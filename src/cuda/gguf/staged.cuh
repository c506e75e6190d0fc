// SPDX-License-Identifier: Apache-2.0
// How staged activations lie in the workspace: a plane of int8, then planes of float32, each
// 256-byte aligned.
//
// Every plane is [m][units][...]; K is filled up to whole units with zeros that no kernel reads as
// data. Inside a unit the int8 codes are ordered as the tensor-core operand wants them: lane t of
// four takes words t and t + 4 of all eight groups, so its 64 bytes stand together.
#pragma once

#include "baracuda/order.cuh"

namespace bcy {

struct Staged {
  int8_t* codes;    // [m][units][4 lanes][8 groups][2 halves][4]
  float* scales;    // [m][units][8]: d_a
  float* sums;      // [m][units][8][minima]: d_a * (sum of u over what the minimum covers)
  int64_t units;
};

constexpr int64_t align_plane(int64_t bytes) { return (bytes + 255) & ~int64_t{255}; }
constexpr int64_t unit_count(int64_t ncols) { return (ncols + kUnit - 1) / kUnit; }

// Byte offset in a unit of word 0 .. 7 of a group.
BCY_INLINE int staged_offset(int group, int word) {
  return 64 * (word & 3) + 8 * group + word / 4 * 4;
}

inline Staged staged_planes(void* workspace, int64_t ncols, int64_t m) {
  const int64_t units = unit_count(ncols);
  int8_t* codes = static_cast<int8_t*>(workspace);
  int8_t* scales = codes + align_plane(m * units * kUnit);
  int8_t* sums = scales + align_plane(m * units * kUnitGroups * int64_t{sizeof(float)});
  return {codes, reinterpret_cast<float*>(scales), reinterpret_cast<float*>(sums), units};
}

inline int64_t staged_bytes(int64_t ncols, int64_t m, int minima) {
  // At most 1 + 12 / 32 bytes an element, a unit of padding a token and the alignment of three
  // planes.
  if (m != 0 && ncols > (INT64_MAX - 768) / 2 / m - kUnit) return -1;
  const int64_t units = m * unit_count(ncols);
  const int64_t floats = units * kUnitGroups * int64_t{sizeof(float)};
  return align_plane(units * kUnit) + align_plane(floats) + align_plane(floats * minima);
}

}  // namespace bcy
