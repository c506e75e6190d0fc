// SPDX-License-Identifier: Apache-2.0
// A thread block whose warpgroups divide K (divided.cuh): its warps, how units reach them, and how
// their sums meet, in shared memory and, where several blocks divide K as well, in the workspace.
#pragma once

#include <stdint.h>

#include <algorithm>

#include "cuda/common/async.cuh"
#include "cuda/common/divided.cuh"

namespace bcy {

// The warps of a thread block, of which four warpgroups multiply, and a fifth copies. Parts: of K,
// which the four divide among them; warps of a part follow each other.
template <int Parts>
struct PartWarps {
  static_assert(Parts == 1 || Parts == 2 || Parts == 4);
  static constexpr int kParts = Parts;
  static constexpr int kWarps = 16;
  static constexpr int kPartWarps = kWarps / Parts;
  static constexpr int kConsumers = kWarps * 32;  // threads
  static constexpr int kThreads = kConsumers + 128;

  // Registers of threads that multiply, and of the others, out of those that all have at first.
  static constexpr int kMany = 112, kFew = 24;
  static_assert(kConsumers * kMany + 128 * kFew <= 65536 / kThreads / 8 * 8 * kThreads);

  // Thread blocks that divide K as well. Where a block has one part, it had better have more.
  static constexpr int kMostBlocks = Parts == 1 ? 1 : kPartials / Parts;

  // Of the ring: as many for each part.
  static constexpr int kMostStages = 16;
  static int stages(int ring_bytes, int stage_bytes) {
    return std::min(ring_bytes / stage_bytes, kMostStages) / Parts * Parts;
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
//
// The rings are filled in one order, and parts meet at the end of each item: with two stages a part
// none waits for what has yet to be filled behind another's, as rows that several blocks divide,
// each with several items, have units for all.
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

// Where blocks meet in the workspace: offsets, and bytes with what is before.
struct Meetings {
  int64_t sums, counts;
  int64_t ncounts;  // zeros before the first and after the last
  int64_t bytes;

  float* sums_in(void* workspace) const {
    return reinterpret_cast<float*>(static_cast<uint8_t*>(workspace) + sums);
  }
  int* counts_in(void* workspace) const {
    return reinterpret_cast<int*>(static_cast<uint8_t*>(workspace) + counts);
  }
};

// How the Sums sums of each lane meet those of the other parts. Warps of a block that have the same
// rows each keep a share.
template <int Parts, int Sums>
struct PartSums {
  using Warps = PartWarps<Parts>;
  static constexpr int kKept = Sums / Parts;
  static_assert(Sums % Parts == 0);

  // Of shared memory.
  static constexpr int kBytes = Parts == 1 ? 0 : Warps::kConsumers * Sums * int(sizeof(float));

  // Of the workspace, from `begin` on.
  static Meetings meetings(int64_t begin, int64_t tiles, int log2_blocks) {
    Meetings all = {};
    all.ncounts = log2_blocks == 0 ? 0 : tiles * Warps::kWarps;
    all.sums = begin;
    all.counts = begin + (all.ncounts << log2_blocks) * (kKept * 32 * int64_t(sizeof(float)));
    all.bytes = all.counts + all.ncounts * int64_t(sizeof(int));
    return all;
  }

  // Of an item's parts, then of its tile's blocks. False where blocks have yet to come; else kept
  // are the sums of all.
  static __device__ __forceinline__ bool meet(const DividedUnits<Parts>& units, int item, int warp,
                                              uint8_t* memory, float* sums, int* counts,
                                              const float (&values)[Sums], float (&kept)[kKept]) {
    meet_in_block(memory, warp, values, kept);
    if (units.log2_blocks == 0) return true;
    const int64_t place = int64_t{units.tile_of(item)} * Warps::kWarps + warp;
    return meet_in_workspace(sums + (place << units.log2_blocks) * (kKept * 32), counts + place,
                             units.block_of(item), units.blocks(), kept);
  }

 private:
  static __device__ __forceinline__ void meet_in_block(uint8_t* memory, int warp,
                                                       const float (&values)[Sums],
                                                       float (&kept)[kKept]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if constexpr (Parts == 1) {
#pragma unroll
      for (int i = 0; i < Sums; ++i) kept[i] = values[i];
    } else {
      const int part = warp / Warps::kPartWarps, rows = warp % Warps::kPartWarps;
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

  // Warp by warp: all blocks' sums, and a count of those that have come.
  static __device__ __forceinline__ bool meet_in_workspace(float* sums, int* count, int block,
                                                           int blocks, float (&kept)[kKept]) {
    const int lane = threadIdx.x % 32;
    const auto of = [&](int b, int i) { return sums + (b * kKept + i) * 32 + lane; };
#pragma unroll
    for (int i = 0; i < kKept; ++i) *of(block, i) = kept[i];
    __threadfence();
    __syncwarp();
    int before = 0;
    if (lane == 0) before = atomicAdd(count, 1);
    if (__shfl_sync(~0u, before, 0) != blocks - 1) return false;
    __threadfence();
    if (lane == 0) *count = 0;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      kept[i] = meet_in_tree(blocks, [&](int b) { return __ldcg(of(b, i)); });
    }
    return true;
  }
};

// How a product is divided, and what it keeps in the workspace.
struct Division {
  int parts = 0;  // of a block; 0 where these kernels are not to be had, or others are faster
  int log2_blocks = 0;  // that divide K as well
  int tiles = 0;
  int stages = 0;  // of the ring
  Meetings meetings = {};  // behind the activations

  int items() const { return tiles << log2_blocks; }
};

}  // namespace bcy
