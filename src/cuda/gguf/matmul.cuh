// SPDX-License-Identifier: Apache-2.0
// y[m, n] = sum_k weight[n, k] * x[m, k] on staged int8 activations, by integer tensor cores.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/common/mma.cuh"
#include "cuda/common/product.cuh"
#include "group_values.cuh"
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
  using Values = GroupValues<Format, kMany>;
  // More products than that take longer than what they save.
  static constexpr int kAddends = gives_turns<Format> && Tokens <= 16 ? 2 : 1;

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

  // Integer sums of a unit, high and low bytes of four, and what scales them, of tokens 2 t and 2 t
  // + 1.
  struct Sums {
    uint2 bytes;
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
    const int offset = group / kBlockGroups * Format::kBytes, g = group % kBlockGroups;
    uint32_t b[kTiles][2];
    int offsets[kTiles][2][4];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      b[n][0] = in_pair == 0 ? x.codes[n].x : x.codes[n].z;
      b[n][1] = in_pair == 0 ? x.codes[n].y : x.codes[n].w;
      Values::multiply_offsets(g, b[n], offsets[n]);
    }
#pragma unroll
    for (int i = 0; i < RowTiles; ++i) {
      const auto upper = rows.row[2 * i] + offset, lower = rows.row[2 * i + 1] + offset;
      uint32_t addends[kAddends][4];
      load_operands<Format, kMany>(upper, lower, g, table_, addends);
      const Values group_values(upper, lower, g);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        float values[4];
        group_values.multiply(addends, b[n], offsets[n], values);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (j % 2 >= kColumns) continue;
          float& sum = partial_[i][n][j];
          sum = fma(values[j], element(x.scales[n], in_pair, j % 2), sum);
          if constexpr (kSums == 1) {
            const float minimum = Format::minimum(j / 2 == 0 ? upper : lower, g, 0);
            sum = add_minimum(sum, minimum, element(x.sums[n], in_pair, j % 2));
          }
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
        mma_half<true>(high, minima[2 * i], minima[2 * i + 1], sums.bytes.x);
        mma_half<true>(dots, minima[2 * i], minima[2 * i + 1], sums.bytes.y);
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
  Table16 table_ = operand_table<Format, kAddends>();
  Activations next_;
  float partial_[RowTiles][kTiles][4];
};

}  // namespace bcy
