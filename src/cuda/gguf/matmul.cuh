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

// The operands and sums that a lane holds: rows r and r + 8; as an operand token r of each tile, as
// sums tokens 2 t and 2 t + 1, where r = lane / 4 and t = lane % 4.
template <class F, int Tiles>
struct StagedTile {
  using Format = F;
  using Inputs = Staged;
  static constexpr int kTokens = Tiles * kTileTokens;
  static constexpr int kBlocks = Tiles == 1 ? 3 : Tiles == 2 ? 2 : 1;

  const uint4* codes;  // of the first token, this lane's part
  const float* scales;
  const float* sums;
  int operand[Tiles];  // offsets from there, in units
  int column[Tiles][2];
  float partial[Tiles][4];

  // Tokens past the end repeat the last one; their sums are not stored.
  __device__ __forceinline__ StagedTile(const bcy_gguf_matmul_args& args, const Staged& staged,
                                        int64_t first_token) {
    const int r = threadIdx.x % 32 / 4;
    const int t = threadIdx.x % 4;
    const int last = int(min(args.m - first_token, int64_t{kTokens})) - 1;
    const int units = int(staged.units);
    codes =
        reinterpret_cast<const uint4*>(staged.codes + first_token * staged.units * kUnit) + 4 * t;
    scales = staged.scales + first_token * staged.units * kUnitGroups;
    sums = staged.sums + first_token * staged.units * kUnitGroups * Format::kMinima;
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
      operand[tile] = min(tile * kTileTokens + r, last) * units;
#pragma unroll
      for (int i = 0; i < 2; ++i)
        column[tile][i] = min(tile * kTileTokens + 2 * t + i, last) * units;
#pragma unroll
      for (int i = 0; i < 4; ++i) partial[tile][i] = 0.0f;
    }
  }

  // Adds one unit. rows: its first byte in row r and in row r + 8; groups: how many of its eight
  // exist.
  __device__ __forceinline__ void add_unit(const uint8_t* const (&rows)[2], int unit, int groups) {
    constexpr int kBlockGroups = Format::kElements / kGroup;
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int pair = 0; pair < kUnitGroups / 2; ++pair) {
      uint4 operands[Tiles];  // two groups
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile)
        operands[tile] = codes[(operand[tile] + unit) * (kUnit / 16) + pair];
#pragma unroll
      for (int in_pair = 0; in_pair < 2; ++in_pair) {
        const int group = 2 * pair + in_pair;
        if (kBlockGroups == 1 && group >= groups) return;
        const int g = group % kBlockGroups;
        const uint8_t* const blocks[2] = {rows[0] + group / kBlockGroups * Format::kBytes,
                                          rows[1] + group / kBlockGroups * Format::kBytes};
        const uint32_t a[4] = {Format::codes(blocks[0], g, t), Format::codes(blocks[1], g, t),
                               Format::codes(blocks[0], g, t + 4),
                               Format::codes(blocks[1], g, t + 4)};
        const float weight_scales[2] = {Format::scale(blocks[0], g), Format::scale(blocks[1], g)};
#pragma unroll
        for (int tile = 0; tile < Tiles; ++tile) {
          const uint32_t b[2] = {in_pair == 0 ? operands[tile].x : operands[tile].z,
                                 in_pair == 0 ? operands[tile].y : operands[tile].w};
          add_group_of_tile(tile, blocks, g, a, b, weight_scales, unit, group);
        }
      }
    }
  }

  __device__ __forceinline__ void store(float (&partials)[kTileRows][kTokens]) const {
    const int r = threadIdx.x % 32 / 4;
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        partials[r + i / 2 * 8][tile * kTileTokens + 2 * t + i % 2] = partial[tile][i];
      }
    }
  }

 private:
  __device__ __forceinline__ void add_group_of_tile(int tile, const uint8_t* const (&blocks)[2],
                                                    int g, const uint32_t (&a)[4],
                                                    const uint32_t (&b)[2],
                                                    const float (&weight_scales)[2], int unit,
                                                    int group) {
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
      const int staged_group = (column[tile][i % 2] + unit) * kUnitGroups + group;
      sum = add_group(sum, dots[i], weight_scales[i / 2], scales[staged_group]);
      if constexpr (Format::kMinima > 0) {
#pragma unroll
        for (int half = 0; half < Format::kMinima; ++half) {
          const float staged_sum = sums[staged_group * Format::kMinima + half];
          sum = add_minimum(sum, Format::minimum(blocks[i / 2], g, half), staged_sum);
        }
      }
    }
  }
};

template <class Format>
int GgufOperations<Format>::matmul(const bcy_gguf_matmul_args& args, cudaStream_t stream) {
  const Staged staged = staged_planes(args.workspace, args.ncols, args.m);
  if (args.m <= 8) return launch_product<StagedTile<Format, 1>>(args, staged, stream);
  if (args.m <= 16) return launch_product<StagedTile<Format, 2>>(args, staged, stream);
  return launch_product<StagedTile<Format, 4>>(args, staged, stream);
}

}  // namespace bcy
