// SPDX-License-Identifier: Apache-2.0
// y[m, n] = sum_k weight[n, k] * x[m, k] on staged int8 activations, by integer tensor cores at
// every M.
#pragma once

#include "mma.cuh"
#include "operations.h"
#include "product.cuh"
#include "staged.cuh"

namespace bcy {

constexpr int kTileTokens = 8;

// RowTiles * 16 weight rows by Tiles * 8 tokens. With r = lane / 4 and t = lane % 4 a lane holds
// the operands of rows r, r + 8, r + 16, ... and of token r of each tile, and the sums of those
// rows with tokens 2 t and 2 t + 1 of each tile.
template <class F, int Tiles, int RowTiles>
class StagedTile {
 public:
  using Format = F;
  using Inputs = Staged;
  static constexpr int kTokens = Tiles * kTileTokens;
  static constexpr int kRows = RowTiles * kTileRows;
  static constexpr int kBlocks = Tiles == 1 ? 3 : 1;

  // Tokens past the end repeat the last one; their sums are not stored.
  __device__ __forceinline__ StagedTile(const bcy_gguf_matmul_args& args, const Staged& staged,
                                        int64_t first_token) {
    const int r = threadIdx.x % 32 / 4;
    const int t = threadIdx.x % 4;
    const int last = int(min(args.m - first_token, int64_t{kTokens})) - 1;
    const int units = int(staged.units);
    const int64_t first_unit = first_token * staged.units;
    codes_ = reinterpret_cast<const uint4*>(staged.codes + first_unit * kUnit) + 4 * t;
    scales_ = reinterpret_cast<const float2*>(staged.scales + first_unit * kUnitGroups);
    sums_ = reinterpret_cast<const float2*>(staged.sums + first_unit * kUnitGroups * kMinima);
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
      operand_[tile] = min(tile * kTileTokens + r, last) * units;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        column_[tile][i] = min(tile * kTileTokens + 2 * t + i, last) * units;
      }
    }
#pragma unroll
    for (int row_tile = 0; row_tile < RowTiles; ++row_tile) {
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) partial_[row_tile][tile][i] = 0.0f;
      }
    }
  }

  __device__ __forceinline__ void add_unit(const uint8_t* const (&rows)[2 * RowTiles], int unit,
                                           int groups) {
#pragma unroll
    for (int pair = 0; pair < kUnitGroups / 2; ++pair) {
      if (kBlockGroups == 1 && 2 * pair >= groups) return;
      const Activations x = load(unit, pair);
#pragma unroll
      for (int in_pair = 0; in_pair < 2; ++in_pair) {
        const int group = 2 * pair + in_pair;
        if (kBlockGroups == 1 && group >= groups) return;
#pragma unroll
        for (int row_tile = 0; row_tile < RowTiles; ++row_tile) {
          const uint8_t* const blocks[2] = {
              rows[2 * row_tile] + group / kBlockGroups * Format::kBytes,
              rows[2 * row_tile + 1] + group / kBlockGroups * Format::kBytes};
          add_row_tile(partial_[row_tile], blocks, group % kBlockGroups, x, in_pair);
        }
      }
    }
  }

  __device__ __forceinline__ void store(float (&partials)[kRows][kTokens]) const {
    const int r = threadIdx.x % 32 / 4;
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int row_tile = 0; row_tile < RowTiles; ++row_tile) {
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          partials[row_tile * kTileRows + r + i / 2 * 8][tile * kTileTokens + 2 * t + i % 2] =
              partial_[row_tile][tile][i];
        }
      }
    }
  }

 private:
  static constexpr int kBlockGroups = Format::kElements / kGroup;
  static constexpr int kMinima = Format::kMinima;

  // Staged activations of two groups, used for all rows.
  struct Activations {
    uint4 codes[Tiles];
    float2 scales[Tiles][2];
    float2 sums[Tiles][2][kMinima > 0 ? kMinima : 1];  // of one group after the other
  };

  __device__ __forceinline__ Activations load(int unit, int pair) const {
    Activations x;
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
      x.codes[tile] = codes_[(operand_[tile] + unit) * (kUnit / 16) + pair];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int pairs = (column_[tile][i] + unit) * (kUnitGroups / 2) + pair;
        x.scales[tile][i] = scales_[pairs];
#pragma unroll
        for (int j = 0; j < kMinima; ++j) x.sums[tile][i][j] = sums_[pairs * kMinima + j];
      }
    }
    return x;
  }

  static __device__ __forceinline__ float element(float2 two, int i) {
    return i == 0 ? two.x : two.y;
  }

  // One group of 16 rows, all tokens.
  __device__ __forceinline__ void add_row_tile(float (&partial)[Tiles][4],
                                               const uint8_t* const (&blocks)[2], int g,
                                               const Activations& x, int in_pair) {
    const int t = threadIdx.x % 4;
    const uint32_t a[4] = {Format::codes(blocks[0], g, t), Format::codes(blocks[1], g, t),
                           Format::codes(blocks[0], g, t + 4), Format::codes(blocks[1], g, t + 4)};
    const float scales[2] = {Format::scale(blocks[0], g), Format::scale(blocks[1], g)};
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
      const uint32_t b[2] = {in_pair == 0 ? x.codes[tile].x : x.codes[tile].z,
                             in_pair == 0 ? x.codes[tile].y : x.codes[tile].w};
      int dots[4] = {};
      if constexpr (Format::kScaleElements == 16) {
        int second[4] = {};
        mma_half<Format::kUnsignedCodes>(dots, a[0], a[1], b[0]);
        mma_half<Format::kUnsignedCodes>(second, a[2], a[3], b[1]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          dots[i] = dots[i] * Format::half_scale(blocks[i / 2], g, 0) +
                    second[i] * Format::half_scale(blocks[i / 2], g, 1);
        }
      } else {
        mma_group<Format::kUnsignedCodes>(dots, a, b);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& sum = partial[tile][i];
        sum = add_group(sum, dots[i], scales[i / 2], element(x.scales[tile][i % 2], in_pair));
        if constexpr (kMinima > 0) {
#pragma unroll
          for (int half = 0; half < kMinima; ++half) {
            const int j = in_pair * kMinima + half;
            const float staged_sum = element(x.sums[tile][i % 2][j / 2], j % 2);
            sum = add_minimum(sum, Format::minimum(blocks[i / 2], g, half), staged_sum);
          }
        }
      }
    }
  }

  const uint4* codes_;  // of the first token, this lane's part
  const float2* scales_;
  const float2* sums_;
  int operand_[Tiles];  // offsets from there, in units
  int column_[Tiles][2];
  float partial_[RowTiles][Tiles][4];
};

template <class Format>
int GgufOperations<Format>::matmul(const bcy_gguf_matmul_args& args, cudaStream_t stream) {
  const Staged staged = staged_planes(args.workspace, args.ncols, args.m);
  if (args.m <= 8) return launch_product<StagedTile<Format, 1, 1>>(args, staged, stream);
  if (args.m <= 16) return launch_product<StagedTile<Format, 2, 2>>(args, staged, stream);
  return launch_product<StagedTile<Format, 4, 2>>(args, staged, stream);
}

}  // namespace bcy
