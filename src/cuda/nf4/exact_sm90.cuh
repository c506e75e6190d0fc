// SPDX-License-Identifier: Apache-2.0
// The product of exact.cuh by look-ups of products, on Hopper and later: the same bits.
//
// A thread block takes one unit of K and one token, and makes a table of what each of the 256 bytes
// of codes adds at each of the unit's 128 places: a pair of order.cuh. Lane l of a warp has word l
// of a row and a bank of shared memory of its own, where the tables of its four places are: no
// look-up meets another's. Rows stream through rings, one for each warp, that run on from one table
// to the next.
//
// The sums of units go to the workspace, and a kernel that follows adds them up.
#pragma once

#include <algorithm>

#include "exact.cuh"
#include "operations.h"

namespace bcy {

struct Nf4Tables {
  static constexpr int kWarps = 16;  // as many as a byte's high nibble has values
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kRows = 16;  // that a warp takes at a time: a box
  static constexpr int kCodeBytes = kRows * kBoxBytes;
  static constexpr int kStageBytes = kCodeBytes + kRows * kRowScales<float>;
  static constexpr int kStages = 2;
  // Places 0 and 1 of all lanes have their entries beside each other, and so have 2 and 3. From the
  // code to an entry's address is one byte permute, as tables begin at multiples of 64 KB.
  static constexpr int kTwoTables = 64 << 10;
  static constexpr int kPitch = 2 * kBoxBytes;
  // In shared memory, wherever in its first 1024 bytes that of a block begins: barriers, rings up
  // to the tables, the tables, the other rings.
  static constexpr int kBarriers = 1024;
  static constexpr int kBelow = (kTwoTables - 1024 - kBarriers) / kStageBytes;  // stages
  static constexpr int kBytes = 3 * kTwoTables + (kWarps * kStages - kBelow) * kStageBytes;
  static_assert(kWarps * kStages * sizeof(uint64_t) <= kBarriers);

  static constexpr int64_t kUsualWorkspace = 16 << 20;  // bytes, unless a token takes more
  static constexpr int64_t bytes_of_token(int64_t nrows, int64_t ncols) {
    return ceil_div(ncols, kUnit) * nrows * int64_t(sizeof(float));
  }
  // Tokens whose sums of units are in the workspace at a time.
  static constexpr int64_t tokens_at_once(int64_t nrows, int64_t ncols, int64_t m) {
    const int64_t fit = kUsualWorkspace / bytes_of_token(nrows, ncols);
    return fit < 1 ? 1 : fit < m ? fit : m;
  }
};
static_assert(kUnitBytes<Nf4Rows> == kBoxBytes);

// The activations of a lane's word in a unit, zeros where there are none.
template <class X>
struct WordOfX {
  typename X::Storage elements[8];

  __device__ __forceinline__ void load(const ProductArgs& args, int64_t token, int unit) {
    const int64_t k = int64_t{unit} * kUnit + threadIdx.x % 32 * 8;
    const auto* const x = static_cast<const typename X::Storage*>(args.x) + token * args.x_stride;
#pragma unroll
    for (int i = 0; i < 8; ++i) elements[i] = k < args.ncols ? x[k + i] : typename X::Storage{};
  }
};

// What every byte adds at the places of this lane's word. Warp w has the bytes whose high nibble is
// w: their first code.
template <class X>
__device__ __forceinline__ void make_tables(const WordOfX<X>& x, const CodeWords& codes,
                                            uint8_t* tables) {
  using T = Nf4Tables;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float first = as_float(codes.words[warp]);
#pragma unroll
  for (int place = 0; place < 4; ++place) {
    const float even = mul(first, X::load(x.elements + 2 * place));
    const float odd = X::load(x.elements + 2 * place + 1);
    auto* const entries =
        reinterpret_cast<float*>(tables + place / 2 * T::kTwoTables + warp * (16 * T::kPitch) +
                                 place % 2 * kBoxBytes) +
        lane;
#pragma unroll
    for (int second = 0; second < 16; ++second) {
      entries[second * (T::kPitch / 4)] = fma(as_float(codes.words[second]), odd, even);
    }
  }
}

// Sums of units to args.workspace, [token][unit][row]. Boxes of 16 rows by a unit, of one unit
// after the other and one token after the other, are divided among thread blocks, and theirs among
// warps by turns. Boxed: scales come with the codes, a float32 to each chunk.
template <class X, bool Boxed>
__global__ void __launch_bounds__(Nf4Tables::kThreads, 1)
    nf4_units_sm90(const __grid_constant__ ProductArgs args,
                   const __grid_constant__ Nf4Inputs inputs,
                   const __grid_constant__ CUtensorMap codes,
                   const __grid_constant__ CUtensorMap scales) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  using T = Nf4Tables;
  BCY_DYNAMIC_SHARED(shared);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  auto* const filled = reinterpret_cast<uint64_t*>(shared) + warp * T::kStages;
  const uint32_t base = shared_address(shared);
  const uint32_t tables_at = (base / T::kTwoTables + 1) * T::kTwoTables;
  uint8_t* const tables = shared + (tables_at - base);
  const auto stage_at = [&](int stage) {
    const int i = warp * T::kStages + stage;
    return i < T::kBelow
               ? T::kBarriers + i * T::kStageBytes
               : int(tables_at - base) + 2 * T::kTwoTables + (i - T::kBelow) * T::kStageBytes;
  };
  const int nrows = int(args.nrows);
  const int units = int(unit_count(args.ncols));
  const int chunks = int(args.ncols / kChunk);
  const int boxes_of_unit = (nrows + T::kRows - 1) / T::kRows;
  const int64_t boxes = args.m * units * boxes_of_unit;
  const int begin = int(boxes * blockIdx.x / gridDim.x);
  const int end = int(boxes * (blockIdx.x + 1) / gridDim.x);

  if (lane == 0) {
    for (int i = 0; i < T::kStages; ++i) barrier_init(&filled[i], 1);
    barrier_init_fence();
  }
  __syncwarp();

  // One box of this warp after the other.
  struct Place {
    int box;
    int row;  // of boxes
    int unit;

    __device__ __forceinline__ void advance(int boxes_of_unit, int units) {
      box += T::kWarps;
      row += T::kWarps;
      while (row >= boxes_of_unit) {
        row -= boxes_of_unit;
        if (++unit == units) unit = 0;
      }
    }
  };
  const int first = begin + warp;
  Place next = {first, first % boxes_of_unit, first / boxes_of_unit % units};
  Place ahead = next;
  const auto fetch = [&](int stage, int zero) {
    if (next.box >= end) return;
    if (lane == 0) {
      const int row = next.row * T::kRows + zero;
      uint8_t* const to = shared + stage_at(stage);
      expect_bytes(&filled[stage], Boxed ? T::kStageBytes : T::kCodeBytes);
      copy_box(to, &codes, next.unit * (kBoxBytes / kPlainElement), row, &filled[stage]);
      if (Boxed) {
        copy_box(to + T::kCodeBytes, &scales, next.unit * (kRowScales<float> / kPlainElement), row,
                 &filled[stage]);
      }
    }
    next.advance(boxes_of_unit, units);
  };
  for (int i = 0; i < T::kStages; ++i) fetch(i, 0);

  // Lane l has chunk l / 8 of rows l % 8 and l % 8 + 8, the latter first in the upper half of the
  // warp.
  const int chunk_here = lane / 8, upper = lane / 16;
  const int lane_row = upper * 8 + lane % 8;
  [[maybe_unused]] typename Scales::Loaded loaded[2];
  const auto load_scales = [&] {
    const int chunk = ahead.unit * kUnitChunks + chunk_here;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = ahead.row * T::kRows + (lane_row ^ i * 8);
      loaded[i] = {0, 0.0f};
      if (ahead.box < end && row < nrows && chunk < chunks) {
        loaded[i] = inputs.scales.load((int64_t{row} * chunks + chunk) >> inputs.shift);
      }
    }
    ahead.advance(boxes_of_unit, units);
  };
  if constexpr (!Boxed) load_scales();
  wait_for_previous_kernel();
  let_next_kernel_start();

  // Row j ^ (l % 8) of the first eight, or of the last in the upper half: what lanes then exchange
  // is in registers whose numbers are constants.
  const uint32_t row_here = lane * 4 + lane_row * kBoxBytes;
  const uint32_t scale_here = T::kCodeBytes + lane_row * kRowScales<float> + chunk_here * 4;
  const uint32_t entry_at = tables_at + lane * 4;
  const uint32_t never = uint32_t(nrows) >> 31;  // no bit is set, which the compiler cannot know
  int stage = 0;
  uint32_t phase = 0;
  for (int box = begin; box < end;) {
    const int turn = box / boxes_of_unit;
    const int unit = turn % units;
    const int of_unit = box - turn * boxes_of_unit;  // the first of these boxes
    const int count = min(end - box, boxes_of_unit - of_unit);
    WordOfX<X> x;
    x.load(args, turn / units, unit);
    __syncthreads();
    make_tables<X>(x, inputs.codes, tables);
    __syncthreads();
    const bool exists = unit * kUnitChunks + chunk_here < chunks;
    // The turns of warps go on from where they were.
    const int skipped = (first - box) & (T::kWarps - 1);
    int row = (of_unit + skipped) * T::kRows + lane_row;
    float* sums_at = static_cast<float*>(args.workspace) + int64_t{turn} * nrows + row;
    for (int i = skipped; i < count; i += T::kWarps) {
      const uint32_t here = base + stage_at(stage);
      [[maybe_unused]] float scale[2];
      if constexpr (!Boxed) {
#pragma unroll
        for (int j = 0; j < 2; ++j) scale[j] = inputs.scales.decode(loaded[j]);
        load_scales();
      }
      barrier_wait(&filled[stage], phase);
      uint32_t words[T::kRows];
#pragma unroll
      for (int j = 0; j < T::kRows; ++j) {
        words[j] = load_shared_word(here + (row_here ^ uint32_t(j * kBoxBytes)));
      }
      if constexpr (Boxed) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint32_t other = j * (8 * kRowScales<float>);
          scale[j] = as_float(load_shared_word(here + (scale_here ^ other)));
        }
      }
      // The next box may overwrite this one once all of it is in registers, which what depends on
      // it alone can tell: loads are not done when they are issued.
      uint32_t seen = Boxed ? as_bits(scale[0]) | as_bits(scale[1]) : 0;
#pragma unroll
      for (int j = 0; j < T::kRows; ++j) seen |= words[j];
      __syncwarp();
      fetch(stage, int(seen & never));
      if (++stage == T::kStages) {
        stage = 0;
        phase ^= 1;
      }
      float sums[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float rows[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          float pairs[4];
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const uint32_t entry = __byte_perm(words[half * 8 + j], entry_at, 0x7604 + 16 * k);
            pairs[k] =
                as_float(load_shared_word(entry + (k / 2 * T::kTwoTables + k % 2 * kBoxBytes)));
          }
          rows[j] = add(add(pairs[0], pairs[1]), add(pairs[2], pairs[3]));
        }
#pragma unroll
        for (int width = 4; width > 0; width /= 2) {
#pragma unroll
          for (int j = 0; j < width; ++j) {
            rows[j] = add(rows[j], __shfl_xor_sync(~0u, rows[j + width], width));
          }
        }
        sums[half] = exists ? mul(rows[0], scale[half]) : 0.0f;
      }
      float sum = add(sums[0], __shfl_xor_sync(~0u, sums[1], 16));
      sum = add(sum, __shfl_xor_sync(~0u, sum, 8));
      if (lane % 16 < 8 && row < nrows) *sums_at = sum;
      row += T::kWarps * T::kRows;
      sums_at += T::kWarps * T::kRows;
    }
    box += count;
  }
#endif
}

// Whether the tables and rings fit, of weights that have chunks of one scale.
inline bool has_nf4_tables(const bcy_nf4_weight& weight, const Device& device) {
  return device.arch >= 900 && device.shared_per_block >= Nf4Tables::kBytes &&
         weight.block_size >= kChunk && weight.nrows > 0 && weight.nrows <= INT32_MAX / 2 &&
         weight.ncols <= kMaxColumns;
}

inline int64_t nf4_tables_workspace(const bcy_nf4_weight& weight, int64_t m, const Device& device) {
  if (!has_nf4_tables(weight, device)) return 0;
  return Nf4Tables::tokens_at_once(weight.nrows, weight.ncols, m) *
         Nf4Tables::bytes_of_token(weight.nrows, weight.ncols);
}

template <class X>
int launch_nf4_tables(const ProductArgs& args, const Nf4Inputs& inputs, const Device& device,
                      cudaStream_t stream) {
  using T = Nf4Tables;
  CUtensorMap codes, scales = {};
  if (const int status = describe_plain_boxes(args.weight, row_bytes<Nf4Rows>(args.ncols),
                                              args.nrows, kBoxBytes, T::kRows, false, codes)) {
    return status;
  }
  const bool boxed = can_copy_scales<float>(args, inputs);
  if (boxed) {
    if (const int status = describe_scales<float>(args, inputs, T::kRows, scales)) {
      return status;
    }
  }
  auto* const kernel = boxed ? nf4_units_sm90<X, true> : nf4_units_sm90<X, false>;
  if (const int status = allow_shared(kernel, device)) return status;
  const int64_t units = ceil_div(args.ncols, kUnit);
  const int64_t at_once = T::tokens_at_once(args.nrows, args.ncols, args.m);
  for (int64_t first = 0; first < args.m; first += at_once) {
    const ProductArgs some = some_tokens(args, first, at_once);
    // Parts that begin where units do save tables, and read all of a row at about the same time.
    const int64_t turns = units * some.m;
    const int64_t even = device.processors / turns * turns;
    const int64_t boxes = turns * ceil_div(args.nrows, T::kRows);
    if (boxes > INT32_MAX / 2) return BCY_ERROR_TOO_LARGE;
    const int64_t blocks =
        std::min(boxes, even * 5 >= device.processors * 4 ? even : device.processors);
    if (const int status = launch(kernel, dim3(unsigned(blocks)), dim3(T::kThreads), stream,
                                  T::kBytes, args.overlap != 0, some, inputs, codes, scales)) {
      return status;
    }
    if (const int status = nf4_add_units(some, stream)) return status;
  }
  return BCY_OK;
}

}  // namespace bcy
