// SPDX-License-Identifier: Apache-2.0
// How the eight partial sums of a row are divided among those that add them up one after the other.
//
// Of 1, 2, 4 or 8 parts, part s adds up the partial sums p with p % parts == s, in the order of the
// tree in which the eight meet, so that one sum is left of each part.
#pragma once

#include <stdint.h>

#include <algorithm>

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

// The sums of two or four parts meet: sum_of(p) is that of part p.
template <class SumOf>
__device__ __forceinline__ float meet_in_tree(int parts, SumOf sum_of) {
  if (parts == 2) return add(sum_of(0), sum_of(1));
  return add(add(sum_of(0), sum_of(2)), add(sum_of(1), sum_of(3)));
}

// The units of a tile of rows, which 2^log2_blocks thread blocks divide, each of which has Parts of
// the parts: part p of block b is number b + p 2^log2_blocks of all. A block takes one item after
// the other: item i is what block i % 2^log2_blocks has of tile i / 2^log2_blocks.
template <int Parts>
struct DividedUnits {
  static constexpr int kLevels = Parts == 1 ? 3 : Parts == 2 ? 2 : 1;  // of the tree in a part

  int units;  // of a row
  int log2_blocks;
  int items;

  struct Place {
    int item, visit, unit;
  };

  __device__ __forceinline__ int blocks() const { return 1 << log2_blocks; }
  __device__ __forceinline__ int visits() const { return kPartials / Parts >> log2_blocks; }
  __device__ __forceinline__ int tile_of(int item) const { return item >> log2_blocks; }
  __device__ __forceinline__ int block_of(int item) const { return item & (blocks() - 1); }

  __device__ __forceinline__ int first_unit(int item, int visit, int part) const {
    return block_of(item) + part * blocks() + visit_offset(visit);
  }
  // Of a part, in the first item of this block; the next after a place, in all of its items.
  __device__ __forceinline__ Place first(int part) const {
    Place place = {int(blockIdx.x), 0, first_unit(blockIdx.x, 0, part)};
    settle(place, part);
    return place;
  }
  __device__ __forceinline__ void advance(Place& place, int part) const {
    place.unit += kPartials;
    settle(place, part);
  }
  __device__ __forceinline__ bool exists(const Place& place) const { return place.item < items; }

 private:
  __device__ __forceinline__ void settle(Place& place, int part) const {
    while (exists(place) && place.unit >= units) {
      if (++place.visit == visits()) {
        place.item += int(gridDim.x);
        place.visit = 0;
      }
      place.unit = first_unit(place.item, place.visit, part);
    }
  }
};

// Into how many thread blocks, up to `most`, it is best to divide K for tiles of rows. In tenths of
// a round, what the parts of a block take for a unit of each, end and meeting: what an item takes
// longer than its rounds, and longer still where it meets others.
struct DividedK {
  int log2_blocks;
  int64_t takes;  // tenths of a round, of the busiest multiprocessor
  int64_t busy;  // percent of all multiprocessors' time
};
inline DividedK divide_k(int64_t tiles, int64_t rounds, int most, int processors, int end,
                         int meeting) {
  DividedK best = {0, INT64_MAX, 0};
  for (int i = 0; 1 << i <= most && 1 << i <= rounds; ++i) {  // each has one
    const int64_t item = ceil_div(10 * rounds, 1 << i) + end + (i == 0 ? 0 : meeting);
    const int64_t takes = ceil_div(tiles << i, processors) * item;
    if (takes >= best.takes) continue;
    best = {i, takes, 1000 * tiles * rounds / std::max(takes * processors, int64_t{1})};
  }
  return best;
}

}  // namespace bcy
