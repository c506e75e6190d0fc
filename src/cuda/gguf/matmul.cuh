// SPDX-License-Identifier: Apache-2.0
// y[m, n] = sum_k weight[n, k] * x[m, k] on staged int8 activations, by integer tensor cores where
// lanes.cuh does not take it.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/common/mma.cuh"
#include "cuda/common/product.cuh"
#include "lanes.cuh"
#include "matmul_sm90.cuh"
#include "operands.cuh"
#include "operations.h"
#include "staged.cuh"

namespace bcy {

// RowTiles * 16 weight rows by Tokens tokens. With r = lane / 4 and t = lane % 4 a lane holds the
// operands of rows r, r + 8, r + 16, ... and of token r of each eight, and the sums of those rows
// with tokens 2 t and 2 t + 1 of each eight; of a single token only lanes with t = 0 hold sums that
// count.
//
// Stays: the staged activations of the tile's tokens lie in shared memory.
template <class F, int Tokens, int RowTiles, int Blocks, bool Ahead = true, bool Stays = false>
class StagedTile : public TileDefaults {
 public:
  using Format = F;
  using Inputs = Staged;
  static constexpr int kTokens = Tokens;
  static constexpr int kRows = RowTiles * kTileRows;
  static constexpr int kBlocks = Blocks;
  static constexpr bool kStartsNextAtOnce = Tokens == 8 && Blocks == 2;
  static constexpr bool kActivationsStay = Stays;

  // Bytes of shared memory that the activations take where they stay; -1 where there are more
  // rounds than lanes to copy them.
  static int64_t staying_bytes(const ProductArgs& args) {
    if (unit_count(args.ncols) > kMostRounds * kPartials) return -1;
    return kArrivedBytes + staged_bytes<Format>(args.ncols, std::min(args.m, int64_t{kTokens}));
  }

  static __device__ __forceinline__ void prepare(const Staged&, uint8_t* memory) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if constexpr (Stays) {
      if (threadIdx.x == 0) {
        for (int i = 0; i < kMostRounds; ++i) barrier_init(arrived(memory, i), kPartials * kTiles);
        barrier_init_fence();
      }
      consumers_sync<kConsumers>();
    }
#endif
  }

  static __device__ __forceinline__ void bring_activations(const ProductArgs& args,
                                                           const Staged& staged,
                                                           int64_t first_token, uint8_t* memory) {
    if constexpr (Stays) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
      // A lane copies a unit of eight tokens.
      const int n = threadIdx.x % kTiles, round = threadIdx.x % 32 / kTiles;
      const int unit = round * kPartials + threadIdx.x / 32, units = int(staged.units);
      const int64_t tile = first_token / kTileTokens + n;
      const bool exists = unit < units && tile * kTileTokens < args.m;
      expect_bytes(arrived(memory, round), exists ? Record::kBytes : 0);
      if (exists) {
        copy_row(memory + kArrivedBytes + (n * units + unit) * Record::kBytes,
                 staged.records + (tile * units + unit) * Record::kBytes, Record::kBytes,
                 arrived(memory, round));
      }
#endif
    } else if constexpr (Tokens <= kTileTokens) {
      if (staged.fused) stage_own_units<Tokens, kSums>(args, staged, memory, int(args.m));
    }
  }

  // Tokens past the end repeat the last one, tiles past the end the last one; their sums are not
  // stored.
  __device__ __forceinline__ StagedTile(const ProductArgs& args, const Staged& staged, int64_t,
                                        int64_t first_token, int first_unit, uint8_t* memory)
      : memory_(memory) {
    const int r = threadIdx.x % 32 / 4;
    const int t = threadIdx.x % 4;
    const bool fused = Tokens <= kTileTokens && staged.fused;
    const uint8_t* const records = (Stays   ? memory + kArrivedBytes
                                    : fused ? memory
                                            : staged.records) +
                                   first_unit * Record::kBytes;
    const int last = int(min(args.m, int64_t{kTileTokens})) - 1;
    const int lane = (Tokens == 1 ? 0 : min(r, last) * 64) + t * 16;
    to_floats_ = (Tokens == 1 ? 0 : min(t, last / 2) * 16) - lane;
    if (kSums > 1) to_sums_ = -lane / 2;
    const int64_t first_tile = Stays ? first_token / kTileTokens : 0;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int64_t tile = min(first_token / kTileTokens + n, (args.m - 1) / kTileTokens);
      start_[n] = records + (tile - first_tile) * staged.units * Record::kBytes + lane;
      // Or the compiler works it out again for every unit; of shared memory it is to know.
      if constexpr (!Stays) keep_in_register(start_[n]);
    }
    if (Ahead && first_unit < int(staged.units)) next_ = load(0, 0);
  }

  __device__ __forceinline__ void clear(int64_t) {
#pragma unroll
    for (int i = 0; i < RowTiles; ++i) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) partial_[i][n][j] = 0.0f;
      }
    }
  }

  // The unit that is `rounds` rounds after the first; `next` is that of the unit to come.
  template <class Row, class Read>
  __device__ __forceinline__ void add_unit(const RowsOf<Row, kRows>& rows, int round, int groups,
                                           int next, Read read) {
    const uint32_t offset = uint32_t(round) * (kPartials * Record::kBytes);
    const uint32_t next_offset = uint32_t(next) * (kPartials * Record::kBytes);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if constexpr (Stays) barrier_wait(arrived(memory_, round), 0);
#endif
    // Only formats whose blocks are groups have units that end early.
    if (kBlockGroups == 1 && groups < kUnitGroups) {
      add_some(rows, offset, groups);
      if (Ahead) next_ = load(next_offset, 0);
      read();
      return;
    }
    [[maybe_unused]] Sums sums;
#pragma unroll
    for (int pair = 0; pair < kUnitPairs; ++pair) {
      if constexpr (kSums > 1 && kTiles == 1) {
        if (pair == kUnitPairs - 1) sums = load_sums(offset, 0);
      }
      const Activations x = Ahead ? next_ : load(offset, pair);
      if (Ahead) next_ = pair + 1 < kUnitPairs ? load(offset, pair + 1) : load(next_offset, 0);
#pragma unroll
      for (int in_pair = 0; in_pair < 2; ++in_pair) {
        add_group_rows(rows, 2 * pair + in_pair, x, in_pair);
      }
    }
    if constexpr (kSums > 1) add_minima(rows, offset, sums);
    read();
  }

  __device__ __forceinline__ void store(
      float (&partials)[Tokens][Meeting<kRows, Tokens>::kPitch]) const {
    const int r = threadIdx.x % 32 / 4;
    const int t = threadIdx.x % 4;
    if (Tokens == 1 && t != 0) return;
#pragma unroll
    for (int i = 0; i < RowTiles; ++i) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (j % 2 >= kColumns) continue;
          partials[n * kTileTokens + 2 * t + j % 2][i * kTileRows + r + j / 2 * 8] =
              partial_[i][n][j];
        }
      }
    }
  }

 private:
  static constexpr int kTiles = (Tokens + kTileTokens - 1) / kTileTokens;
  static constexpr int kColumns = Tokens == 1 ? 1 : 2;
  static constexpr int kBlockGroups = Format::kElements / kGroup;
  static constexpr int kSums = kStagedSums<Format>;
  static constexpr bool kMany = Tokens > kTileTokens;
  static constexpr bool kHalves = multiplies_halves<Format, kMany>;
  // More products than that take longer than what they save.
  static constexpr int kParts = gives_turns<Format> && Tokens <= 16 ? 2 : 1;

  using Record = StagedRecord<Tokens == 1 ? 1 : kTileTokens, kSums>;

  // In front of activations that stay: a barrier for each round of them.
  static constexpr int kMostRounds = 32 / kTiles;
  static constexpr int kArrivedBytes = (kMostRounds * int(sizeof(uint64_t)) + 15) / 16 * 16;
  static __device__ __forceinline__ uint64_t* arrived(uint8_t* memory, int round) {
    return reinterpret_cast<uint64_t*>(memory) + round;
  }
  using Floats = std::conditional_t<Tokens == 1, float2, float4>;

  // Staged activations of two groups, used for all rows.
  struct Activations {
    uint4 codes[kTiles];
    Floats scales[kTiles];  // group 0: tokens 2 t, 2 t + 1; group 1: the same
    Floats sums[kTiles];     // of groups

    __device__ __forceinline__ void second_to_first(int n) {
      codes[n].x = codes[n].z;
      codes[n].y = codes[n].w;
      replace(scales[n]);
      if (kSums == 1) replace(sums[n]);
    }
    static __device__ __forceinline__ void replace(float4& four) {
      four.x = four.z;
      four.y = four.w;
    }
    static __device__ __forceinline__ void replace(float2& two) { two.x = two.y; }
  };

  // offset: of the unit's record from the first.
  __device__ __forceinline__ Activations load(uint32_t offset, int pair) const {
    Activations x;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const uint8_t* const codes = start_[n] + offset;
      const uint8_t* const floats = codes + to_floats_;
      x.codes[n] = *reinterpret_cast<const uint4*>(codes + pair * Record::kCodes);
      x.scales[n] =
          *reinterpret_cast<const Floats*>(floats + Record::kScalesAt + pair * Record::kScales);
      if constexpr (kSums == 1) {
        x.sums[n] =
            *reinterpret_cast<const Floats*>(floats + Record::kSumsAt + pair * Record::kScales);
      }
    }
    return x;
  }

  // Integer sums of a unit, high and low parts, and what scales them, of tokens 2 t and 2 t + 1.
  struct Sums {
    uint2 parts;
    float2 scales;
  };
  __device__ __forceinline__ Sums load_sums(uint32_t offset, int n) const {
    const uint8_t* const codes = start_[n] + offset;
    const uint8_t* const scales = codes + to_floats_ + Record::kSumScalesAt;
    return {*reinterpret_cast<const uint2*>(codes + to_sums_ + Record::kSumsAt),
            Tokens == 1 ? float2{*reinterpret_cast<const float*>(scales), 0.0f}
                        : *reinterpret_cast<const float2*>(scales)};
  }

  static __device__ __forceinline__ float element(float4 four, int group, int column) {
    return group == 0 ? (column == 0 ? four.x : four.y) : (column == 0 ? four.z : four.w);
  }
  static __device__ __forceinline__ float element(float2 two, int group, int) {
    return group == 0 ? two.x : two.y;
  }

  // The first groups of a unit, in a loop: for the end of a row.
  template <class Row>
  __device__ __forceinline__ void add_some(const RowsOf<Row, kRows>& rows, uint32_t offset,
                                           int groups) {
#pragma unroll 1
    for (int group = 0; group < groups; ++group) {
      // A group on its own: its place in the unit is no constant, so neither is its alignment.
      using Moved = decltype(rows.row[0].template moved<Format::kAlignment>(0));
      RowsOf<Moved, kRows> blocks;
#pragma unroll
      for (int i = 0; i < 2 * RowTiles; ++i) {
        blocks.row[i] = rows.row[i].template moved<Format::kAlignment>(group * Format::kBytes);
      }
      Activations x = load(offset, group / 2);
      if (group % 2 == 1) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) x.second_to_first(n);
      }
      add_group_rows(blocks, 0, x, 0);
    }
  }

  // Group `group` of the blocks' unit, all rows and tokens.
  template <class Row>
  __device__ __forceinline__ void add_group_rows(const RowsOf<Row, kRows>& rows, int group,
                                                 const Activations& x, int in_pair) {
    const int offset = group / kBlockGroups * Format::kBytes;
#pragma unroll
    for (int i = 0; i < RowTiles; ++i) {
      add_row_tile(partial_[i], rows.row[2 * i] + offset, rows.row[2 * i + 1] + offset,
                   group % kBlockGroups, x, in_pair);
    }
  }

  // One group of 16 rows, all tokens.
  template <class Block>
  __device__ __forceinline__ void add_row_tile(float (&partial)[kTiles][4], Block upper,
                                               Block lower, int g, const Activations& x,
                                               int in_pair) {
    uint32_t parts[kParts][4];
    load_operands<Format, kMany>(upper, lower, g, table_, parts);
    const int shift = operand_shift<Format, kMany>(g), start = int(sum_start(shift));
    const float row_scales[2] = {operand_scale<Format, kMany>(upper, g),
                                 operand_scale<Format, kMany>(lower, g)};
    [[maybe_unused]] SumScale<Format> scales[2], half_scales[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (kHalves) {
        const uint32_t word = Format::half_scales(i == 0 ? upper : lower, g);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float scale = byte_to_float(word, 2 * (g % 2) + half, Format::kHalfOffset);
          half_scales[i][half] = SumScale<Format>(scale, shift);
        }
      } else {
        scales[i] = SumScale<Format>(row_scales[i], shift);
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const uint32_t b[2] = {in_pair == 0 ? x.codes[n].x : x.codes[n].z,
                             in_pair == 0 ? x.codes[n].y : x.codes[n].w};
      int dots[4] = {start, start, start, start};
      float values[4];
      if constexpr (kHalves) {
        int second[4] = {start, start, start, start};
        const auto& a = parts[0];
        mma_half<Format::kUnsignedCodes>(dots, a[0], a[1], b[0]);
        mma_half<Format::kUnsignedCodes>(second, a[2], a[3], b[1]);
        // Exact, as the sum of integers is: all are below 2^24.
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const auto& of_halves = half_scales[i / 2];
          values[i] = scaled(add(of_halves[0].times(dots[i]), of_halves[1].times(second[i])),
                             finite_or_nan(row_scales[i / 2]));
        }
      } else {
#pragma unroll
        for (const auto& a : parts) mma_group<Format::kUnsignedCodes>(dots, a, b);
#pragma unroll
        for (int i = 0; i < 4; ++i) values[i] = scales[i / 2].times(dots[i]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i % 2 >= kColumns) continue;
        float& sum = partial[n][i];
        sum = fma(values[i], element(x.scales[n], in_pair, i % 2), sum);
        if constexpr (kSums == 1) {
          const float minimum = Format::minimum(i / 2 == 0 ? upper : lower, g, 0);
          sum = add_minimum(sum, minimum, element(x.sums[n], in_pair, i % 2));
        }
      }
    }
  }

  // The integer minima of a unit, all rows and tokens. offset: as in load.
  template <class Row>
  __device__ __forceinline__ void add_minima(const RowsOf<Row, kRows>& rows, uint32_t offset,
                                             const Sums& first) {
    const int t = threadIdx.x % 4;
    uint32_t minima[2 * RowTiles];
    SumScale<Format> scales[2 * RowTiles];
#pragma unroll
    for (int i = 0; i < 2 * RowTiles; ++i) {
      // Where there are eight, the others meet zeros.
      minima[i] = Format::minima(rows.row[i], t % (kSums / 4));
      scales[i] = SumScale<Format>(Format::minimum_scale(rows.row[i]), 0);
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const Sums sums = kTiles == 1 ? first : load_sums(offset, n);
#pragma unroll
      for (int i = 0; i < RowTiles; ++i) {
        constexpr int kStart = int(sum_start(0));
        int high[4] = {}, dots[4] = {kStart, kStart, kStart, kStart};
        mma_half<true>(high, minima[2 * i], minima[2 * i + 1], sums.parts.x);
        mma_half<true>(dots, minima[2 * i], minima[2 * i + 1], sums.parts.y);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (j % 2 >= kColumns) continue;
          partial_[i][n][j] = fma(scales[2 * i + j / 2].times((high[j] << kLowSumBits) + dots[j]),
                                  j % 2 == 0 ? sums.scales.x : sums.scales.y, partial_[i][n][j]);
        }
      }
    }
  }

  const uint8_t* start_[kTiles];  // this lane's codes in the record of this warp's first unit
  int to_floats_;                 // from there to its floats, less what they are into the record
  int to_sums_;                   // and to its integer sums
  uint8_t* memory_;               // that holds activations that stay
  Table16 table_ = operand_table<Format, kParts>();
  Activations next_;
  float partial_[RowTiles][kTiles][4];
};

// ---- launch -----------------------------------------------------------------------------------------------------

// Enough for all kernels, whichever a weight's address lets run.
template <class Format>
int64_t GgufOperations<Format>::workspace_size(const ProductArgs& args, const Device& device) {
  const int64_t staged = staged_bytes<Format>(args.ncols, args.m);
  return staged < 0 ? staged : std::max(staged, divide_gguf<Format>(args, device).meetings.bytes);
}

template <class Format>
int GgufOperations<Format>::stage(const ProductArgs& args, const Device& device,
                                  cudaStream_t stream) {
  constexpr int kSums = kStagedSums<Format>;
  Staging staging = {gives_turns<Format>, args.overlap != 0 && device.waits()};
  staging.spread = args.m > kTileTokens;
  if (const Division division = divide_gguf<Format>(args, device); division.parts > 0) {
    return with_gguf_boxes<Format>(args.m, division.parts, [&](auto boxes) {
      using Record = typename decltype(boxes)::Record;
      staging.counts = division.meetings.counts_in(args.workspace);
      staging.ncounts = int(division.meetings.ncounts);
      return gguf_stage<Record>(args, staging, stream);
    });
  }
  if (takes_lanes<Format>(args, device)) {
    Geometry geometry;
    if (const int status = lane_geometry<Format>(args, device, geometry)) return status;
    staging.beside = geometry.beside;
    staging.late = geometry.ahead < geometry.stages;
  } else if (args.m > 1) {
    staging.spread |= has_few_rows(args, device);
    return gguf_stage<StagedRecord<kTileTokens, kSums>>(args, staging, stream);
  }
  return gguf_stage<StagedRecord<1, kSums>>(args, staging, stream);
}

template <class Format>
int GgufOperations<Format>::matmul(const ProductArgs& args, const Device& device,
                                   cudaStream_t stream) {
  const bool fused = args.workspace == nullptr && args.ncols > 0;
  const bool unstaged = !fused && args.x != nullptr && args.ncols > 0;
  if (fused && !stages_inside<Format>(args, device)) return BCY_ERROR_INVALID_ARGUMENT;
  if (unstaged) {
    if (const int status = stage(args, device, stream)) return status;
  }
  // After this call's own staging the product may start early: only activations come from there.
  const bool early = args.overlap != 0 || unstaged;
  if (const Division division = divide_gguf<Format>(args, device); division.parts > 0) {
    return with_gguf_boxes<Format>(args.m, division.parts, [&](auto boxes) {
      return launch_gguf_sm90<Format, decltype(boxes)>(args, division, device, early, stream);
    });
  }
  const Staged staged = staged_of(args, gives_turns<Format>, fused);
  // extra: bytes of activations in shared memory.
  const auto run = [&](auto* tile, auto* ring, int64_t extra) {
    using Tile = std::remove_pointer_t<decltype(tile)>;
    using Ring = std::remove_pointer_t<decltype(ring)>;
    return launch_streamed<Tile, Ring>(args, staged, device, int(extra), early,
                                       args.overlap != 0 && !unstaged, stream);
  };
  const auto streamed = [&](auto* tile, auto* ring) {
    return run(tile, ring, fused ? staged_bytes<Format>(args.ncols, args.m) : 0);
  };
  // Tiles and rings to choose from. The bits are the same.
  constexpr auto narrow = [](auto tokens) {
    return static_cast<StagedTile<Format, decltype(tokens)::value, 1, 2>*>(nullptr);
  };
  // Many tokens leave no registers to load activations ahead, nor, with what minima and scales of
  // halves take, for two tiles of rows.
  constexpr bool kLarge =
      !std::is_same_v<Format, Q2_K> && (Format::kMinima > 0 || Format::kScaleElements == 16);
  constexpr auto wide = [](auto tokens, auto row_tiles) {
    constexpr int kTokens = decltype(tokens)::value, kRowTiles = decltype(row_tiles)::value;
    constexpr bool kAhead = kTokens <= 8 || (kTokens == 16 && !(kLarge && kRowTiles == 2));
    return static_cast<StagedTile<Format, kTokens, kRowTiles, 1, kAhead>*>(nullptr);
  };
  constexpr std::integral_constant<int, 1> one{};
  constexpr std::integral_constant<int, 2> two{};
  constexpr std::integral_constant<int, 8> eight{};
  constexpr std::integral_constant<int, 16> sixteen{};
  constexpr std::integral_constant<int, 32> thirty_two{};
  if (device.arch < 800) {
    return args.m == 1 ? launch_direct(narrow(one), args, staged, stream)
                       : launch_direct(narrow(eight), args, staged, stream);
  }
  if constexpr (constexpr int kMost = kLaneTokens<Format>; kMost > 0) {
    if (takes_lanes<Format>(args, device)) {
      return with_lane_tokens<kMost>(args.m, [&](auto tokens) {
        using Tile = LaneTile<Format, decltype(tokens)::value>;
        return with_lane_ring<Format>(args, [&](auto* ring) {
          return run(static_cast<Tile*>(nullptr), ring, Tile::activation_bytes(args.ncols));
        });
      });
    }
  }
  const bool on_boundaries = rows_on_boundaries<Format>(args);
  // Calls function(ring) with the ring of rows for a tile.
  const auto with_rows = [&](auto* tile, auto function) {
    constexpr int kRows = std::remove_pointer_t<decltype(tile)>::kRows;
    return on_boundaries ? function(static_cast<RowRing<Format, kRows, true>*>(nullptr))
                         : function(static_cast<RowRing<Format, kRows, false>*>(nullptr));
  };
  const auto by_rows = [&](auto* tile) {
    return with_rows(tile, [&](auto* rows) { return streamed(tile, rows); });
  };
  // Whether there is room for two stages of them.
  const auto fits = [&](auto* tile, int64_t extra) {
    using Tile = std::remove_pointer_t<decltype(tile)>;
    return with_rows(tile, [&](auto* rows) { return holds<Tile>(rows, 2, extra, device); });
  };
  const bool few_rows = has_few_rows(args, device);
  // Of a few more tiles of 32 rows than multiprocessors some take two and most one; of tiles of 16
  // rows they all take two or three.
  const int64_t tiles = ceil_div(args.nrows, 2 * kTileRows);
  const bool uneven = tiles > device.processors && 4 * tiles <= 5 * device.processors;
  if (args.m > 16) {
    // One tile of rows for 32 tokens: their activations are more than the L1 cache holds, and more
    // than the weights.
    if constexpr (kLarge) {
      using Tile = StagedTile<Format, 32, 1, 1, false, true>;
      Tile* const tile = nullptr;
      const int64_t extra = Tile::staying_bytes(args);
      const int64_t passes = ceil_div(args.m, Tile::kTokens);
      // Few tiles do not make up for the copy, nor for the processors that are left over where each
      // pass has as many.
      const int64_t left_over = device.processors % passes;
      const bool stay = device.arch >= 900 && extra >= 0 && 8 * left_over <= device.processors &&
                        ceil_div(args.nrows, Tile::kRows) * passes >= 3 * device.processors;
      if (stay && fits(tile, extra)) {
        return with_rows(tile, [&](auto* rows) { return run(tile, rows, extra); });
      }
    }
    // With float minima a few registers spill, which costs less.
    if constexpr (!kLarge || kStagedSums<Format> == 1) {
      const bool by_sixteen = few_rows || (uneven && !kLarge) || !fits(wide(thirty_two, two), 0);
      if (!by_sixteen) return by_rows(wide(thirty_two, two));
    }
    return by_rows(wide(thirty_two, one));
  }
  // Boxes copy fastest; with rows and narrow tiles more fits a multiprocessor side by side, which
  // five and six bits gain from longest: they take the most instructions for their bytes.
  constexpr int kBits = kWholeBits<Format>;
  const int fewest = args.m <= 8 && (kBits == 5 || kBits == 6) ? 12 : 3;
  const bool enough = args.nrows >= fewest * 32 * int64_t{device.processors};
  BoxRing<Format, 32>* const boxes = nullptr;
  const auto boxed = [&](auto* tile) {
    using Tile = std::remove_pointer_t<decltype(tile)>;
    return enough && has_boxes<Format>(args, device) && holds<Tile>(boxes, 2, 0, device);
  };
  if (args.m > 8) {
    const bool by_sixteen = few_rows || uneven || !fits(wide(sixteen, two), 0);
    if (by_sixteen) return by_rows(wide(sixteen, one));
    // 32 rows of scales of halves leave no registers for the places in boxes.
    if constexpr (!multiplies_halves<Format>) {
      if (boxed(wide(sixteen, two))) return streamed(wide(sixteen, two), boxes);
    }
    return by_rows(wide(sixteen, two));
  }
  if (args.m == 1) return by_rows(narrow(one));
  if (boxed(wide(eight, two))) return streamed(wide(eight, two), boxes);
  return by_rows(narrow(eight));
}

}  // namespace bcy
