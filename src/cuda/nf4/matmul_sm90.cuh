// SPDX-License-Identifier: Apache-2.0
// The product of matmul.cuh for many rows and more than four tokens on Hopper: the same bits.
//
// A thread block takes 128 rows and some units of K, one after the other. Each of its four
// warpgroups has 32 rows, 8 to a warp, whose high and low parts are the 16 of an instruction. The
// copy engine brings the codes of a unit, its scales where they can be boxed, and the activations,
// which a kernel before has put into the workspace in the order in which tensor cores read them.
//
// Where rows are few, several blocks divide K, and meet in the workspace.
#pragma once

#include <algorithm>

#include "cuda/common/divided.cuh"
#include "cuda/common/warpgroup.cuh"
#include "matmul.cuh"
#include "operations.h"

namespace bcy {

// Tokens: 8, 16 or 32. What a block holds in shared memory.
template <int Tokens>
struct Nf4Boxes {
  static constexpr int kWarps = 16;
  static constexpr int kConsumers = kWarps * 32;  // threads
  static constexpr int kThreads = kConsumers + 128;  // a warpgroup more, of which one copies
  static constexpr int kRows = kWarps * 8;

  // Bytes of a stage of the ring, a unit: codes, activations, scales.
  static constexpr int kCodes = kRows * kBoxBytes;
  static constexpr int kX = kUnitChunks * kWarpgroupX<Tokens>;
  // Of a row's scales: the least that the copy engine copies, a unit's floats or the codes of
  // nested ones of four units.
  static constexpr int kScaleBox = 16;
  static_assert(kRowScales<float> == kScaleBox);
  static constexpr int kScales = kRows * kScaleBox;
  static constexpr int kStage = kCodes + kX + kScales;
  static_assert(kWarpgroupElements == kChunk);
  static_assert(kStage % 1024 == 0);  // a swizzled box begins at a multiple of its pattern

  // Registers of threads that multiply, and of the others, out of those that all have at first.
  static constexpr int kMany = 112, kFew = 24;
  static_assert(kConsumers * kMany + 128 * kFew <= 65536 / kThreads / 8 * 8 * kThreads);

  // Offsets: barriers, the code of nested scales, the table, the ring.
  static constexpr int kCode = 1024;
  static constexpr int kTable = 2048;
  static constexpr int kRing = kTable + kTableBytes;
  static_assert(2 * kMaxStages * sizeof(uint64_t) <= kCode && kRing % 1024 == 0);

  static constexpr int kSums = Tokens / 4;  // of a lane
};

// How a product is divided, and what it keeps in the workspace.
struct Nf4Division {
  int blocks;  // that divide K: 1, 2, 4 or 8
  int tiles;
  int stages;  // of the ring
  int64_t sums, counts;  // where they begin, behind the activations
  int64_t bytes;
};

// Tokens at a time.
inline int nf4_tokens(int64_t m) { return m > 16 ? 32 : m > 8 ? 16 : 8; }

// bytes is 0 where the kernel is not to be had, as on GPUs after Hopper, or others are faster:
// those need less to begin with, fewer rows to keep all multiprocessors busy, and gain less from
// more tokens.
inline Nf4Division divide_nf4(const bcy_nf4_weight& weight, int64_t m, const Device& device) {
  const int64_t elements_worth_it = m > 16 ? 200000 : 400000;  // a multiprocessor
  constexpr int kRows = Nf4Boxes<8>::kRows, kWarps = Nf4Boxes<8>::kWarps;
  Nf4Division division = {};
  const int64_t tiles = ceil_div(weight.nrows, kRows), units = ceil_div(weight.ncols, kUnit);
  if (device.arch < 900 || device.own_arch != 900 || weight.block_size < kChunk ||
      weight.ncols > kMaxColumns || weight.nrows > INT32_MAX / 2 || m <= 4 ||
      (m <= 8 && tiles < 4 * device.processors) ||
      weight.nrows * weight.ncols < elements_worth_it * device.processors) {
    return division;
  }
  const int tokens = nf4_tokens(m);
  const int stage = Nf4Boxes<8>::kStage + (tokens - 8) * (kUnit * 2);
  division.stages = std::min((device.shared_per_block - Nf4Boxes<8>::kRing) / stage, kMaxStages);
  if (division.stages < 2) return division;
  const DividedK divided = divide_k(tiles, units, 8, device.processors, 3, 37);
  division.blocks = divided.blocks;
  if (m <= 16 && 10 * tiles * units < divided.takes * device.processors * 6 / 10) return division;
  division.tiles = int(tiles);
  division.sums = units * kUnit * 2 * tokens;
  const int64_t warps = division.blocks == 1 ? 0 : tiles * kWarps;
  division.counts = division.sums + warps * division.blocks * 8 * tokens * int64_t(sizeof(float));
  division.bytes = division.counts + warps * int64_t(sizeof(int));
  return division;
}

// So few that blocks find room beside those of the product before.
constexpr int kStagingThreads = 64;

// The activations of all units: [piece of 8 elements][token]. A lane's byte t of a word has
// elements 2 t and 2 t + 1 of four in a group, as multiply_group takes them: what are neighbours
// there are eight apart here. A thread has a group of a token, and a count to set to zero.
template <int Tokens>
__global__ void nf4_stage(const __grid_constant__ ProductArgs args, int64_t groups, int* counts,
                          int64_t ncounts) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (args.overlap) let_next_kernel_start();
  wait_for_previous_kernel();
  if (!args.overlap) let_next_kernel_start();
  const int64_t i = int64_t{blockIdx.x} * kStagingThreads + threadIdx.x;
  if (i < ncounts) counts[i] = 0;
  if (i >= groups) return;
  const int64_t group = i / Tokens, token = i % Tokens;
  uint4 x[4];
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const int64_t k = group * kGroup + t * 8;
    x[t] = {0, 0, 0, 0};
    if (token < args.m && k < args.ncols) {
      x[t] = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(args.x) +
                                             token * args.x_stride + k);
    }
  }
  auto* const to = static_cast<uint4*>(args.workspace) + i / Tokens * (4 * Tokens) + i % Tokens;
  to[0 * Tokens] = {x[0].x, x[1].x, x[2].x, x[3].x};
  to[1 * Tokens] = {x[0].y, x[1].y, x[2].y, x[3].y};
  to[2 * Tokens] = {x[0].z, x[1].z, x[2].z, x[3].z};
  to[3 * Tokens] = {x[0].w, x[1].w, x[2].w, x[3].w};
#endif
}

// sums, counts: used where several blocks divide K, each of which has units. Item i is part i %
// blocks of tile i / blocks.
template <class X, int Tokens, class Absmax>
__global__ void __launch_bounds__(Nf4Boxes<Tokens>::kThreads, 1)
    nf4_product_sm90(const __grid_constant__ ProductArgs args,
                     const __grid_constant__ Nf4Inputs inputs,
                     const __grid_constant__ CUtensorMap matrix,
                     const __grid_constant__ CUtensorMap scales, float* sums, int* counts,
                     int blocks, int items, int stages) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  using B = Nf4Boxes<Tokens>;
  constexpr int kTiles = Tokens / 8;
  constexpr bool kBoxed = !std::is_void_v<Absmax>, kFloats = std::is_same_v<Absmax, float>;
  BCY_DYNAMIC_SHARED(shared);
  auto* const filled = reinterpret_cast<uint64_t*>(shared);
  uint64_t* const emptied = filled + kMaxStages;
  uint8_t* const ring = shared + B::kRing;
  // The same for all lanes, which the compiler then knows.
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const int lane = threadIdx.x % 32;
  const int nrows = int(args.nrows);
  const int units = int((args.ncols + kUnit - 1) / kUnit);
  const int visits = kPartials / blocks;

  if (threadIdx.x == B::kConsumers) {
    for (int i = 0; i < stages; ++i) {
      barrier_init(&filled[i], 1);
      barrier_init(&emptied[i], B::kWarps);
    }
    barrier_init_fence();
  }
  __syncthreads();

  // The units of this block, one after the other, in all of its items.
  struct Place {
    int item, visit, unit;
  };
  const auto first_of = [&](int item) { return Place{item, 0, item % blocks}; };
  const auto exists = [&](const Place& place) { return place.item < items; };
  const auto advance = [&](Place& place) {
    place.unit += kPartials;
    while (place.unit >= units) {
      if (++place.visit == visits) {
        place = first_of(place.item + int(gridDim.x));
      } else {
        place.unit = place.item % blocks + visit_offset(place.visit);
      }
    }
  };
  const Place first = first_of(int(blockIdx.x));

  if (warp >= B::kWarps) {
    leave_registers<B::kFew>();
    if (threadIdx.x != B::kConsumers) return;
    const auto copy_weights = [&](const Place& place, int stage) {
      uint8_t* const to = ring + stage * B::kStage;
      const int row = place.item / blocks * B::kRows;
      expect_bytes(&filled[stage], B::kCodes + B::kX + (kBoxed ? B::kScales : 0));
      copy_box(to, &matrix, place.unit * kBoxBytes, row, &filled[stage]);
      if constexpr (kBoxed) {
        const int box = place.unit * kRowScales<Absmax> / B::kScaleBox;
        copy_box(to + B::kCodes + B::kX, &scales, box * (B::kScaleBox / kPlainElement), row,
                 &filled[stage]);
      }
    };
    Place ahead = first;
    for (int i = 0; i < stages && exists(ahead); ++i, advance(ahead)) copy_weights(ahead, i);
    wait_for_previous_kernel();
    // Not before: the next kernel's weights would come ahead of this one's activations.
    let_next_kernel_start();
    int stage = 0, copied = 0;
    uint32_t phase = 1;
    for (Place place = first; exists(place); advance(place)) {
      barrier_wait(&emptied[stage], phase);
      if (copied++ >= stages) copy_weights(place, stage);
      copy_row(ring + stage * B::kStage + B::kCodes,
               static_cast<const uint8_t*>(args.workspace) + int64_t{place.unit} * B::kX, B::kX,
               &filled[stage]);
      if (++stage == stages) {
        stage = 0;
        phase ^= 1;
      }
    }
    return;
  }
  take_registers<B::kMany>();

  const int row_here = warp * 8 + lane / 4;  // in a tile
  // Scales that are no floats in boxes: lane t has that of chunk t of its row, and loads what is
  // not in a box a unit ahead.
  [[maybe_unused]] typename Scales::Loaded loaded = {0, 0.0f};
  [[maybe_unused]] Place ahead = first;
  [[maybe_unused]] const auto load_scale = [&] {
    loaded = {0, 0.0f};
    if (!exists(ahead)) return;
    const int row = ahead.item / blocks * B::kRows + row_here;
    const int chunk = ahead.unit * kUnitChunks + lane % 4, chunks = int(args.ncols / kChunk);
    if (row < nrows && chunk < chunks) {
      const int64_t block = (int64_t{row} * chunks + chunk) >> inputs.shift;
      if constexpr (kBoxed) {
        loaded.nested = inputs.scales.nested_of(block);
      } else {
        loaded = inputs.scales.load(block);
      }
    }
    advance(ahead);
  };
  auto* const code = reinterpret_cast<float*>(shared + B::kCode);
  if constexpr (!kFloats) load_scale();
  if (kBoxed && !kFloats && threadIdx.x < 256) {
    code[threadIdx.x] = inputs.scales.nested_code[threadIdx.x];
  }
  fill_table<B::kConsumers>(shared + B::kTable, inputs.codes, pair_of_halves);
  consumers_sync<B::kConsumers>();

  const Table table(shared + B::kTable);
  const uint32_t ring_at = shared_address(ring);
  const uint32_t codes_at = row_here * kBoxBytes + lane / 4 * 16 + lane % 4 * 4;
  // A chunk's codes as the parts of this warp's rows.
  const auto decode = [&](uint32_t stage_at, int chunk, uint32_t (&parts)[4][4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t word = load_shared_word((stage_at + codes_at) ^ uint32_t(chunk * 32 + i * 16));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint2 entry = table(word, j);
        parts[2 * i + j / 2][j % 2 * 2] = entry.x;
        parts[2 * i + j / 2][j % 2 * 2 + 1] = entry.y;
      }
    }
  };

  // Sum i of a lane is that of token 8 (i / 2) + 2 t + i % 2.
  const auto write = [&](int tile, const float (&values)[B::kSums]) {
    const int row = tile * B::kRows + row_here;
    if (row >= nrows) return;
    const float bias = args.bias == nullptr ? 0.0f : load_element(args.bias, row, args.y_type);
#pragma unroll
    for (int i = 0; i < B::kSums; ++i) {
      const int token = i / 2 * 8 + lane % 4 * 2 + i % 2;
      if (token >= args.m) continue;
      store_element(args.y, token * args.y_stride + row, args.y_type,
                    args.bias == nullptr ? values[i] : add(values[i], bias));
    }
  };
  Nf4Sums<X, 1, kTiles, kChunk> unit_sums;
  uint32_t parts[2][4][4];
  int stage = 0;
  uint32_t phase = 0;
  Place next = first;
  barrier_wait(&filled[0], 0);
  decode(ring_at, 0, parts[0]);
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const int part = item % blocks;
    float waiting[3][B::kSums];
    float values[B::kSums];
    for (int visit = 0; visit < visits; ++visit) {
      unit_sums.clear();
      for (int unit = part + visit_offset(visit); unit < units; unit += kPartials) {
        const int this_stage = stage;
        const uint32_t stage_at = ring_at + this_stage * B::kStage;
        float scale_of[kUnitChunks];
        [[maybe_unused]] float scale = 0.0f;
        [[maybe_unused]] const uint8_t* const scales_at =
            ring + this_stage * B::kStage + B::kCodes + B::kX + row_here * B::kScaleBox;
        if constexpr (kFloats) {
          const float4 four = *reinterpret_cast<const float4*>(scales_at);
          scale_of[0] = mul(four.x, inputs.unit);
          scale_of[1] = mul(four.y, inputs.unit);
          scale_of[2] = mul(four.z, inputs.unit);
          scale_of[3] = mul(four.w, inputs.unit);
        } else {
          if constexpr (kBoxed) {
            const int first = unit * kUnitChunks % B::kScaleBox;
            scale = inputs.scales.decode(code[scales_at[first + lane % 4]], loaded.nested);
          } else {
            scale = inputs.scales.decode(loaded);
          }
          scale = mul(scale, inputs.unit);
          load_scale();
        }
        advance(next);
#pragma unroll
        for (int chunk = 0; chunk < kUnitChunks; ++chunk) {
          float products[kTiles][4];
          warpgroup_multiply<X, Tokens>(products, parts[chunk % 2],
                                        stage_at + B::kCodes + chunk * kWarpgroupX<Tokens>);
          if (chunk + 1 < kUnitChunks) {
            decode(stage_at, chunk + 1, parts[(chunk + 1) % 2]);
          } else if (exists(next)) {
            if (++stage == stages) {
              stage = 0;
              phase ^= 1;
            }
            barrier_wait(&filled[stage], phase);
            decode(ring_at + stage * B::kStage, 0, parts[0]);
          }
          if constexpr (!kFloats) {
            scale_of[chunk] = __shfl_sync(~0u, scale, (lane & 28) + chunk);
          }
          warpgroup_wait<Tokens>(products);
          unit_sums.add_chunk(0, chunk, products, scale_of[chunk]);
        }
        // All of the stage has been multiplied, which took what every lane has loaded.
        if (lane == 0) barrier_arrive(&emptied[this_stage]);
      }
#pragma unroll
      for (int i = 0; i < B::kSums; ++i) values[i] = unit_sums.partial[0][i / 2][i % 2];
      join_tree(visit, values, waiting);
    }
    const int64_t rows = int64_t{item / blocks} * B::kWarps + warp;
    if (blocks == 1 ||
        meet_parts(sums + rows * blocks * B::kSums * 32, counts + rows, part, blocks, values)) {
      write(item / blocks, values);
    }
  }
#endif
}

template <class X, int Tokens>
int launch_nf4_sm90(const ProductArgs& args, const Nf4Inputs& inputs, const Nf4Division& division,
                    const Device& device, cudaStream_t stream) {
  using B = Nf4Boxes<Tokens>;
  CUtensorMap codes, scales = {};
  if (const int status = describe_boxes(args.weight, row_bytes<Nf4Rows>(args.ncols), args.nrows,
                                        B::kRows, false, codes)) {
    return status;
  }
  auto* kernel = nf4_product_sm90<X, Tokens, void>;
  const int status = with_absmax(args, inputs, [&](auto absmax) {
    using Absmax = typename decltype(absmax)::type;
    kernel = nf4_product_sm90<X, Tokens, Absmax>;
    if constexpr (std::is_void_v<Absmax>) return int(BCY_OK);
    return describe_scales<Absmax>(args, inputs, B::kScaleBox, B::kRows, scales);
  });
  if (status != BCY_OK) return status;
  if (const int status = allow_shared(kernel, device)) return status;

  auto* const workspace = static_cast<uint8_t*>(args.workspace);
  auto* const sums = reinterpret_cast<float*>(workspace + division.sums);
  auto* const counts = reinterpret_cast<int*>(workspace + division.counts);
  const int items = division.tiles * division.blocks;
  const int64_t groups = ceil_div(args.ncols, kUnit) * kUnitGroups * Tokens;  // of all tokens
  const int64_t ncounts = (division.bytes - division.counts) / int64_t(sizeof(int));
  for (int64_t first = 0; first < args.m; first += Tokens) {
    const ProductArgs some = some_tokens(args, first, Tokens);
    if (const int status = launch(
            nf4_stage<Tokens>, dim3(unsigned(ceil_div(std::max(groups, ncounts), kStagingThreads))),
            dim3(kStagingThreads), stream, 0, args.overlap != 0, some, groups, counts, ncounts)) {
      return status;
    }
    if (const int status =
            launch(kernel, dim3(unsigned(std::min(items, device.processors))), dim3(B::kThreads),
                   stream, B::kRing + division.stages * B::kStage, true, some, inputs, codes,
                   scales, sums, counts, division.blocks, items, division.stages)) {
      return status;
    }
  }
  return BCY_OK;
}

}  // namespace bcy
