// SPDX-License-Identifier: Apache-2.0
// How weights reach the products, and how their partial sums meet: the same for staged and for
// float activations.
//
// A thread block takes tiles of weight rows and tokens, one after the other. Warp p is partial sum
// p of the summation order: it takes units p, p + 8, ... of K, so that the weights are read once
// whatever the number of tokens, and the eight warps meet in shared memory. Two kernels differ in
// how weights arrive, never in what is added in which order:
//   product_streamed  a ninth warp keeps a ring of copies to shared memory in flight, through the
//                     ends of tiles; the grid fills the GPU once (Ampere and later)
//   product_direct    every lane loads what it needs
// Those of Hopper alone, in files that end in _sm90, have ways of their own, and the same order.
//
// What a lane adds up is a Tile: a struct with
//   Format, Inputs                        weights, activations
//   kRows, kTokens                        of a tile; rows are a multiple of 16
//   kBlocks                               thread blocks whose registers fit a multiprocessor
//   Tile(args, inputs, first_row, first_token, first_unit, memory)
//                                         for the units first_unit, first_unit + 8, ..., if there
//                                         are any
//   clear(following)                      sums to zero; following: first row of the tile after it
//   add_unit(rows, round, groups, next, read)
//                                         unit first_unit + 8 round. rows: what the ring's Lane
//                                         gives; groups: how many exist; next: round that comes
//                                         next; read(): called when no byte of the unit is needed
//                                         any more
//   store(partials)                       this warp's sums, [token][row]
// and, where it differs from TileDefaults, a constant of these and
//   prefetch(args, inputs, first_row, round)
//                                         by the warp that fetches a round's weights: asks for what
//                                         else of them comes from memory
//   prepare(inputs, memory)               once a thread block, by the consumers: what shared memory
//                                         holds without the activations
//   bring_activations(args, inputs, first_token, memory)
//                                         once a thread block, by the consumers: what shared memory
//                                         holds of them, after the previous kernel
#pragma once

#include <limits.h>

#include "baracuda/order.cuh"
#include "cuda/common/async.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/ring.cuh"

namespace bcy {

constexpr int kTileRows = 16;
constexpr int kConsumers = kPartials * 32;  // threads
constexpr int64_t kMaxColumns = 1 << 28;  // offsets inside a row or a block's tokens fit 32 bits
constexpr int kMaxStages = 8;

struct TileDefaults {
  // Whether the next kernel starts its copies together with this one's, or not before this one may
  // bring its activations, which would queue up behind them. Where those come a few at a time, in
  // blocks that share a multiprocessor, the earlier start is worth more, unless there are fewer
  // blocks than multiprocessors: then two of the next one's would crowd on one that is empty.
  static constexpr bool kStartsNextAtOnce = false;
  // Whether bringing activations takes as long as a round's weights, which then need not come
  // before.
  static constexpr bool kBringsLong = false;
  // Whether shared memory holds the activations of a tile's tokens: then a thread block keeps to
  // those.
  static constexpr bool kActivationsStay = false;
  // Whether a tile takes little longer than its weights take to arrive.
  static constexpr bool kReadsMost = false;

  template <class Inputs>
  static __device__ __forceinline__ void prefetch(const ProductArgs&, const Inputs&, int64_t, int) {
  }
  template <class Inputs>
  static __device__ __forceinline__ void prepare(const Inputs&, uint8_t*) {}
  template <class Inputs>
  static __device__ __forceinline__ void bring_activations(const ProductArgs&, const Inputs&,
                                                           int64_t, uint8_t*) {}
};

// Where a tile's eight partial sums meet. Rows are padded so that the lanes of a warp, which hold
// eight rows of four pairs of tokens, write to different banks.
template <int Rows, int Tokens>
struct Meeting {
  static constexpr int kPitch = Rows + 4;
  float partials[kPartials][Tokens][kPitch];

  // By the consumers alone.
  __device__ __forceinline__ void write(const ProductArgs& args, int64_t first_row,
                                        int64_t first_token) const {
    const int rows = int(min(args.nrows - first_row, int64_t{Rows}));
    const int tokens = int(min(args.m - first_token, int64_t{Tokens}));
#pragma unroll 1
    for (int first = 0; first < Rows * Tokens; first += kConsumers) {
      const int i = first + int(threadIdx.x);
      if (i % Rows >= rows || i / Rows >= tokens) continue;
      const int64_t row = first_row + i % Rows;
      const int64_t token = first_token + i / Rows;
      float p[kPartials];
#pragma unroll
      for (int j = 0; j < kPartials; ++j) p[j] = partials[j][i / Rows][i % Rows];
      store_output(args, token, row, meet(p));
    }
  }
};

// ---- weights loaded by the lanes that use them -------------------------------------------------------------------

template <class Tile>
__global__ void __launch_bounds__(kConsumers)
    product_direct(const __grid_constant__ ProductArgs args,
                   const __grid_constant__ typename Tile::Inputs inputs, unsigned passes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  using Format = typename Tile::Format;
  __shared__ Meeting<Tile::kRows, Tile::kTokens> meeting;
  const int groups = int(args.ncols / kGroup);
  const int64_t first_row = blockIdx.x / passes * int64_t{Tile::kRows};
  const int64_t first_token = blockIdx.x % passes * int64_t{Tile::kTokens};
  // Rows past the end repeat the last one; they are not stored.
  const uint8_t* rows[Tile::kRows / 8];
#pragma unroll
  for (int i = 0; i < Tile::kRows / 8; ++i) {
    const int64_t row = min(first_row + threadIdx.x % 32 / 4 + 8 * i, args.nrows - 1);
    rows[i] = static_cast<const uint8_t*>(args.weight) + row * row_bytes<Format>(args.ncols);
  }
  const int warp = threadIdx.x / 32;
  Tile tile(args, inputs, first_row, first_token, warp, nullptr);
  tile.clear(first_row);
  for (int round = 0; (round * kPartials + warp) * kUnitGroups < groups; ++round) {
    const int unit = round * kPartials + warp;
    RowsOf<Bytes<Format::kAlignment>, Tile::kRows> in_unit;
#pragma unroll
    for (int i = 0; i < Tile::kRows / 8; ++i) {
      in_unit.row[i] = Bytes<Format::kAlignment>(rows[i] + int64_t{unit} * kUnitBytes<Format>);
    }
    const int next = (unit + kPartials) * kUnitGroups < groups ? round + 1 : round;
    tile.add_unit(in_unit, round, groups - unit * kUnitGroups, next, [] {});
  }
  tile.store(meeting.partials[threadIdx.x / 32]);
  __syncthreads();
  meeting.write(args, first_row, first_token);
#endif
}

// ---- weights streamed through shared memory ---------------------------------------------------------------------

// What comes before the ring in shared memory: the barriers, and one or two places to meet. With
// two, the next tile's sums need not wait until this one's are written.
template <class Tile>
struct Shared {
  using Sums = Meeting<Tile::kRows, Tile::kTokens>;
  static constexpr int kMeetings = sizeof(Sums) <= 10 * 1024 ? 2 : 1;
  static constexpr int kBytes =
      (2 * kMaxStages * int(sizeof(uint64_t)) + kMeetings * int(sizeof(Sums)) + 1023) / 1024 * 1024;
};

template <class Tile, class Ring>
__global__ void __launch_bounds__(kConsumers + 32, Tile::kBlocks)
    product_streamed(const __grid_constant__ ProductArgs args,
                     const __grid_constant__ typename Tile::Inputs inputs,
                     const __grid_constant__ typename Ring::Source source, unsigned tiles,
                     unsigned passes, int stages, int ahead, bool next_at_once) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (__CUDA_ARCH__ < Ring::kOldestArch) return;
  using Sums = typename Shared<Tile>::Sums;
  BCY_DYNAMIC_SHARED(shared);
  auto* const filled = reinterpret_cast<uint64_t*>(shared);
  uint64_t* const emptied = filled + kMaxStages;
  auto* const meetings = reinterpret_cast<Sums*>(emptied + kMaxStages);
  uint8_t* const ring = shared + Shared<Tile>::kBytes;
  const int warp = threadIdx.x / 32;
  const int groups = int(args.ncols / kGroup);
  const int units = (groups + kUnitGroups - 1) / kUnitGroups;
  const int rounds = (units + kPartials - 1) / kPartials;

  if (threadIdx.x == kConsumers) {
    for (int i = 0; i < stages; ++i) {
      barrier_init(&filled[i], kCopyArrivals);
      barrier_init(&emptied[i], kConsumers);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (next_at_once) let_next_kernel_start();
  int stage = 0;
  uint32_t phase = 0;
  // Most often there is one pass, and a division takes as long as a unit's loads.
  const auto first_row_of = [&](unsigned index) {
    return (passes == 1 ? index : index / passes) * int64_t{Tile::kRows};
  };
  const auto first_token_of = [&](unsigned index) {
    return passes == 1 ? 0 : index % passes * int64_t{Tile::kTokens};
  };

  if (warp == kPartials) {
    unsigned index = blockIdx.x;
    int round = 0;
    bool first_lap = true;
    // Where tiles are quick, what comes before the wait has a loop of its own: to ask each time
    // whether it is due takes longer than to fetch the instructions of another loop.
    constexpr bool kApart = Tile::kTokens <= 2;
    const auto fetch_some = [&](int count) {
      for (; index < tiles; index += gridDim.x, round = 0) {
        const int64_t first_row = first_row_of(index);
        for (; round < rounds; ++round) {
          if (count-- == 0) {
            if (kApart) return;
            wait_for_previous_kernel();
          }
          Tile::prefetch(args, inputs, first_row, round);
          if (!first_lap) barrier_wait(&emptied[stage], phase ^ 1);
          Ring::fetch(args, source, first_row, round, ring + stage * Ring::kStageBytes,
                      &filled[stage]);
          if (++stage == stages) {
            stage = 0;
            phase ^= 1;
            first_lap = false;
          }
        }
      }
    };
    fetch_some(ahead);
    if (kApart) {
      wait_for_previous_kernel();
      fetch_some(INT_MAX);
    }
    return;
  }

  uint8_t* const memory = ring + stages * Ring::kStageBytes + kRingTail;
  Tile::prepare(inputs, memory);
  wait_for_previous_kernel();
  if (!next_at_once) let_next_kernel_start();
  Tile::bring_activations(args, inputs, first_token_of(blockIdx.x), memory);
  // Warps without units, where K is short, add nothing: their sums stay zero.
  const int own_rounds = units > warp ? (units - warp + kPartials - 1) / kPartials : 0;
  int meeting = 0;
  Tile tile(args, inputs, first_row_of(blockIdx.x), first_token_of(blockIdx.x), warp, memory);
  for (unsigned index = blockIdx.x; index < tiles; index += gridDim.x) {
    const int64_t first_row = first_row_of(index);
    const int64_t first_token = first_token_of(index);
    if (passes > 1 && !Tile::kActivationsStay && index != blockIdx.x) {
      tile = Tile(args, inputs, first_row, first_token, warp, memory);
    }
    tile.clear(first_row_of(index + gridDim.x));
    const typename Ring::Lane lanes(args, first_row);
    for (int round = 0; round < rounds; ++round) {
      barrier_wait(&filled[stage], phase);
      // Every lane for itself: that costs no more than to meet in the warp first.
      const auto read = [&] { barrier_arrive(&emptied[stage]); };
      if (round < own_rounds) {
        const int left = groups - (round * kPartials + warp) * kUnitGroups;
        const int next = round + 1 < own_rounds ? round + 1 : 0;
        tile.add_unit(lanes.rows(ring + stage * Ring::kStageBytes), round, left, next, read);
      } else {
        read();
      }
      if (++stage == stages) {
        stage = 0;
        phase ^= 1;
      }
    }
    if (Shared<Tile>::kMeetings == 1) consumers_sync<kConsumers>();
    tile.store(meetings[meeting].partials[warp]);
    consumers_sync<kConsumers>();
    meetings[meeting].write(args, first_row, first_token);
    if (Shared<Tile>::kMeetings == 2) meeting ^= 1;
  }
#endif
}

// ---- launch -----------------------------------------------------------------------------------------------------

// How a launch is divided. A ring that holds more than it takes to keep the memory busy gains
// nothing. Where two blocks fit a multiprocessor they are of one launch, or, when kernels may
// overlap and there are few tiles, of this one and the next, which then fetches its weights ahead.
// A block of one tile that is more than half of shared memory holds has all of it where
// multiprocessors are left over for the next kernel, or where it does little but read: it begins
// later, but has fetched more when its turn comes.
struct Geometry {
  unsigned tiles, passes, blocks;
  int stages;  // of the ring
  // That are fetched while the kernel before still runs: all, but where that kernel, one like this
  // supposedly, is still fetching for most of its time, and would wait for these.
  int ahead;
  int shared_bytes;
  bool beside;  // a multiprocessor has one of these blocks, and room for one of the next kernel's
};

// What a block takes of shared memory besides the ring. extra: bytes of activations.
template <class Tile>
constexpr int64_t fixed_bytes(int64_t extra) {
  return Shared<Tile>::kBytes + kRingTail + extra;
}

// Whether shared memory holds a ring of some stages beside that.
template <class Tile, class Ring>
bool holds(const Ring*, int stages, int64_t extra, const Device& device) {
  return fixed_bytes<Tile>(extra) + stages * Ring::kStageBytes <= device.shared_per_block;
}

// What a block may have of it where as many as registers allow share a multiprocessor.
template <class Tile>
int share_of(const Device& device) {
  return device.shared_per_processor / Tile::kBlocks - device.shared_reserved;
}
// Whether they do, each with a ring of two stages or more.
template <class Tile, class Ring>
bool shares_processor(const Ring*, const Device& device) {
  return fixed_bytes<Tile>(0) + 2 * Ring::kStageBytes <= share_of<Tile>(device);
}

// alone: no kernel that this one waits for is part of the same call.
template <class Tile, class Ring>
int geometry_of(const ProductArgs& args, const Device& device, int extra, bool alone,
                Geometry& geometry) {
  const int64_t processors = device.processors;
  const int64_t passes = ceil_div(args.m, Tile::kTokens);
  const int64_t tiles = ceil_div(args.nrows, Tile::kRows) * passes;
  const int64_t rounds = ceil_div(args.ncols, kPartials * kUnit);
  if (tiles > kMaxGridX || args.ncols > kMaxColumns) return BCY_ERROR_TOO_LARGE;
  const int fixed = int(fixed_bytes<Tile>(extra));
  const int whole = device.shared_per_block;
  const int share = share_of<Tile>(device);
  const auto stages_in = [&](int bytes) { return (bytes - fixed) / Ring::kStageBytes; };
  const bool one_each =
      tiles <= processors / (Tile::kReadsMost ? 1 : 2) && rounds > stages_in(share);
  const bool shares = stages_in(share) >= 2 && !one_each;
  const int most = stages_in(shares && share < whole ? share : whole);
  if (most < 1) return BCY_ERROR_TOO_LARGE;
  constexpr int kBusy = (Tile::kBlocks > 1 ? 75 : 104) << 10;
  int stages = (kBusy + Ring::kStageBytes / 2) / Ring::kStageBytes;
  if (stages < 2) stages = 2;
  if (one_each || stages > kMaxStages) stages = kMaxStages;
  if (stages > most) stages = most;
  // Few: what a block takes of the matrix is little more than the ring holds.
  const bool leaves_room = alone && ceil_div(tiles, processors) * rounds <= stages;
  int64_t at_once = processors * (shares && !leaves_room ? Tile::kBlocks : 1);
  if (Tile::kActivationsStay) at_once -= at_once % passes;
  const int64_t blocks = tiles < at_once ? tiles : at_once;
  const int64_t needed = ceil_div(tiles, blocks) * rounds;
  geometry.tiles = unsigned(tiles);
  geometry.passes = unsigned(passes);
  geometry.blocks = unsigned(blocks);
  geometry.stages = int(needed < stages ? needed : stages);
  geometry.beside = shares && tiles <= processors;
  const bool room = geometry.beside || 2 * tiles <= processors;  // for the next kernel's blocks
  const bool long_rows = room && rounds > 2 * geometry.stages;
  const bool brings_long = Tile::kBringsLong && tiles > blocks && rounds <= geometry.stages;
  geometry.ahead = long_rows || brings_long ? 1 : geometry.stages;
  geometry.shared_bytes = fixed + geometry.stages * Ring::kStageBytes;
  return BCY_OK;
}

template <class Tile, class Ring>
int launch_streamed(const ProductArgs& args, const typename Tile::Inputs& inputs,
                    const Device& device, int extra, bool early, bool alone, cudaStream_t stream) {
  Geometry geometry;
  if (const int status = geometry_of<Tile, Ring>(args, device, extra, alone, geometry)) {
    return status;
  }
  typename Ring::Source source;
  if (const int status = Ring::describe(args, inputs, source)) return status;
  auto* kernel = product_streamed<Tile, Ring>;
  if (const int status = allow_shared(kernel, device)) return status;
  const bool next_at_once = Tile::kStartsNextAtOnce && geometry.tiles > unsigned(device.processors);
  return launch(kernel, dim3(geometry.blocks), dim3(kConsumers + 32), stream, geometry.shared_bytes,
                early && device.waits(), args, inputs, source, geometry.tiles, geometry.passes,
                geometry.stages, geometry.ahead, next_at_once);
}

template <class Tile>
int launch_direct(const Tile*, const ProductArgs& args, const typename Tile::Inputs& inputs,
                  cudaStream_t stream) {
  // Blocks of the same rows follow each other, so that later tokens find the weights in the L2
  // cache.
  const int64_t passes = ceil_div(args.m, Tile::kTokens);
  const int64_t blocks = ceil_div(args.nrows, Tile::kRows) * passes;
  if (blocks > kMaxGridX || args.ncols > kMaxColumns) return BCY_ERROR_TOO_LARGE;
  return launch(product_direct<Tile>, dim3(unsigned(blocks)), dim3(kConsumers), stream, 0, false,
                args, inputs, unsigned(passes));
}

}  // namespace bcy
