// SPDX-License-Identifier: Apache-2.0
// How the eight partial sums of a row are divided among those that add them up one after the other,
// and how what they leave meets.
//
// Of 1, 2, 4 or 8 parts, part s adds up the partial sums p with p % parts == s, in the order of the
// tree in which the eight meet, so that one sum is left of each part.
#pragma once

#include "baracuda/order.cuh"
#include "cuda/common/async.cuh"
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

// The sums of 1, 2, 4 or 8 parts meet: sum_of(p) is that of part p.
template <class SumOf>
__device__ __forceinline__ float meet_in_tree(int parts, SumOf sum_of) {
  if (parts == 1) return sum_of(0);
  if (parts == 2) return add(sum_of(0), sum_of(1));
  if (parts == 4) return add(add(sum_of(0), sum_of(2)), add(sum_of(1), sum_of(3)));
  return meet(sum_of(0), sum_of(1), sum_of(2), sum_of(3), sum_of(4), sum_of(5), sum_of(6),
              sum_of(7));
}

// Where parts are of one thread block: warps of the same rows each keep a share of their sums and
// give the others away. Warps: of the block, those of a part one after the other.
template <int Warps, int Parts, int Sums>
struct PartExchange {
  static constexpr int kKept = Sums / Parts;
  static_assert(Sums % Parts == 0);
  static constexpr int kBytes = Parts == 1 ? 0 : Warps * Sums * 32 * int(sizeof(float));

  // memory: kBytes.
  static __device__ __forceinline__ void meet(uint8_t* memory, int warp,
                                              const float (&values)[Sums], float (&kept)[kKept]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if constexpr (Parts == 1) {
#pragma unroll
      for (int i = 0; i < Sums; ++i) kept[i] = values[i];
    } else {
      constexpr int kPartWarps = Warps / Parts;
      const int part = warp / kPartWarps, rows = warp % kPartWarps;
      float* const sums =
          reinterpret_cast<float*>(memory) + rows * (Parts * Sums * 32) + threadIdx.x % 32;
      warps_sync<Parts * 32>(rows);  // what was there has been read
#pragma unroll
      for (int i = 0; i < Sums; ++i) sums[(part * Sums + i) * 32] = values[i];
      warps_sync<Parts * 32>(rows);
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        kept[i] =
            meet_in_tree(Parts, [&](int p) { return sums[(p * Sums + part * kKept + i) * 32]; });
      }
    }
#endif
  }
};

// The units of thread blocks that take items. An item is some of the parts of a tile of rows:
// where 2^log2_blocks items divide a tile, item i is number i % 2^log2_blocks of tile i /
// 2^log2_blocks, and Parts parts of K, which some warps of the block have each.
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

// A stage of a part's ring: of all stages every Parts-th.
template <int Parts>
struct PartStage {
  int index;
  uint32_t phase;

  __device__ __forceinline__ void advance(int stages) {
    index += Parts;
    if (index >= stages) {
      index -= stages;
      phase ^= 1;
    }
  }
};

// What one thread does to bring all units of a block through rings of `stages` in all.
// copy_weights(item, unit, stage), copy_activations(unit, stage): start copies that fill a stage;
// emptied: by stages, what its part arrives at.
template <int Parts, class CopyWeights, class CopyActivations>
__device__ __forceinline__ void bring_units(const DividedUnits<Parts>& units, int stages,
                                            uint64_t* emptied, CopyWeights copy_weights,
                                            CopyActivations copy_activations) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  // Where the first part has a unit, the next one has the one `blocks` on, if there is one.
  int ahead[Parts] = {};
  auto place = units.first(0);
  for (int i = 0; i < stages && units.exists(place); i += Parts, units.advance(place, 0)) {
#pragma unroll
    for (int part = 0; part < Parts; ++part) {
      const int unit = place.unit + part * units.blocks();
      if (unit < units.units) copy_weights(place.item, unit, part + Parts * ahead[part]++);
    }
  }
  wait_for_previous_kernel();
  // Not before: the next kernel's weights would come ahead of this one's activations.
  let_next_kernel_start();
  PartStage<Parts> stage[Parts];
#pragma unroll
  for (int part = 0; part < Parts; ++part) stage[part] = {part, 1};
  for (place = units.first(0); units.exists(place); units.advance(place, 0)) {
#pragma unroll
    for (int part = 0; part < Parts; ++part) {
      const int unit = place.unit + part * units.blocks();
      if (unit >= units.units) continue;
      const int to = stage[part].index;
      barrier_wait(&emptied[to], stage[part].phase);
      if (ahead[part]-- <= 0) copy_weights(place.item, unit, to);
      copy_activations(unit, to);
      stage[part].advance(stages);
    }
  }
#endif
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
    values[i] = meet_in_tree(parts, [&](int p) { return __ldcg(of(p, i)); });
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
