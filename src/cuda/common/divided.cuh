// SPDX-License-Identifier: Apache-2.0
// How the eight partial sums of a row are divided among those that add them up one after the other,
// and how what they leave meets.
//
// Of 1, 2, 4 or 8 parts, part s adds up the partial sums p with p % parts == s, in the order of the
// tree in which the eight meet, so that one sum is left of each part.
#pragma once

#include "baracuda/order.cuh"
#include "cuda/common/launch.cuh"

namespace bcy {

// Part s is at partial sum s + visit_offset(v) when it visits its v-th: then those that meet follow
// each other.
BCY_INLINE int visit_offset(int visit) { return 0x73516240 >> 4 * visit & 7; }

// The sums of one more visit join what waits for them, as far as the tree has leaves by now; after
// the last visit they are the part's.
template <int Level = 0, int Levels, int Sums>
__device__ __forceinline__ void join_tree(int visit, float (&values)[Sums],
                                          float (&waiting)[Levels][Sums]) {
  if constexpr (Level < Levels) {
    if (visit >> Level & 1) {
      stay_branch();
#pragma unroll
      for (int i = 0; i < Sums; ++i) values[i] = add(waiting[Level][i], values[i]);
      join_tree<Level + 1>(visit, values, waiting);
    } else {
      stay_branch();
#pragma unroll
      for (int i = 0; i < Sums; ++i) waiting[Level][i] = values[i];
    }
  }
}

// Where parts are of different thread blocks, they meet in the workspace, warp by warp. place: of
// this warp's first part there, each of [Sums][32]; count: of those that have come, 0 before the
// first and after the last. True for the last to come: then values are the sums of all.
template <int Sums>
__device__ __forceinline__ bool meet_parts(float* place, int* count, int part, int parts,
                                           float (&values)[Sums]) {
  const int lane = threadIdx.x % 32;
  const auto of = [&](int p, int i) { return place + (p * Sums + i) * 32 + lane; };
#pragma unroll
  for (int i = 0; i < Sums; ++i) *of(part, i) = values[i];
  __threadfence();
  __syncwarp();
  int before = 0;
  if (lane == 0) before = atomicAdd(count, 1);
  if (__shfl_sync(~0u, before, 0) != parts - 1) return false;
  __threadfence();
  if (lane == 0) *count = 0;
#pragma unroll
  for (int i = 0; i < Sums; ++i) {
    const auto sum_of = [&](int p) { return __ldcg(of(p, i)); };
    if (parts == 2) {
      values[i] = add(sum_of(0), sum_of(1));
    } else if (parts == 4) {
      values[i] = add(add(sum_of(0), sum_of(2)), add(sum_of(1), sum_of(3)));
    } else {
      values[i] = meet(sum_of(0), sum_of(1), sum_of(2), sum_of(3), sum_of(4), sum_of(5), sum_of(6),
                       sum_of(7));
    }
  }
  return true;
}

// Into how many thread blocks, up to `most`, it is best to divide K for tiles of rows, and what the
// busiest multiprocessor then takes, in tenths of a unit's time. end, meeting: what an item takes
// longer than its units, and longer still where it meets others.
struct DividedK {
  int blocks;
  int64_t takes;
};
inline DividedK divide_k(int64_t tiles, int64_t units, int most, int processors, int end,
                         int meeting) {
  DividedK best = {1, INT64_MAX};
  for (int blocks = 1; blocks <= most && blocks <= units; blocks *= 2) {  // each has one
    const int64_t item = ceil_div(10 * units, blocks) + end + (blocks == 1 ? 0 : meeting);
    const int64_t all = ceil_div(tiles * blocks, processors) * item;
    if (all < best.takes) best = {blocks, all};
  }
  return best;
}

}  // namespace bcy
