// SPDX-License-Identifier: Apache-2.0
// y[m, n] = sum_k weight[n, k] * x[m, k] on staged int8 activations.
//
// A thread block owns 16 weight rows and Tiles * 8 tokens. Warp p is partial sum p of the summation order: it takes
// units p, p + 8, ... of K, so that the weights are read once whatever the number of tokens, and the eight warps meet
// in shared memory.
#pragma once

#include "baracuda/order.cuh"
#include "launch.cuh"
#include "mma.cuh"
#include "operations.h"
#include "staged.cuh"

namespace bcy {

constexpr int kTileRows = 16;
constexpr int kTileTokens = 8;

template <class Format, int Tiles>
__global__ void __launch_bounds__(kPartials * 32) matmul_kernel(const __grid_constant__ bcy_gguf_matmul_args args,
                                                                const __grid_constant__ Staged staged) {
  constexpr int kBlockGroups = Format::kElements / kGroup;
  constexpr int kTokens = Tiles * kTileTokens;
  constexpr bool kHalves = Format::kScaleElements == 16;
  constexpr int kMinima = Format::kMinima;
  __shared__ float partials[kPartials][kTileRows][kTokens];

  const int partial = threadIdx.x / 32;
  const int r = threadIdx.x % 32 / 4;
  const int t = threadIdx.x % 4;
  const int64_t groups = args.ncols / kGroup;
  const int64_t row_bytes = args.ncols / Format::kElements * Format::kBytes;
  const int64_t first_row = int64_t{blockIdx.x} * kTileRows;

  // Rows and tokens past the end are computed from the last one and not stored.
  const uint8_t* rows[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = min(first_row + r + 8 * i, args.nrows - 1);
    rows[i] = static_cast<const uint8_t*>(args.weight) + row * row_bytes;
  }

  for (int64_t first_token = int64_t{blockIdx.y} * kTokens; first_token < args.m;
       first_token += int64_t{gridDim.y} * kTokens) {
    const int8_t* codes[Tiles];  // of token r, the one whose operand this lane loads
    int64_t tokens[Tiles][2];    // 2t and 2t + 1, the ones whose sums this lane holds
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
      const int64_t token = first_token + tile * kTileTokens;
      codes[tile] = staged.codes + min(token + r, args.m - 1) * args.ncols + 4 * t;
      tokens[tile][0] = min(token + 2 * t, args.m - 1) * groups;
      tokens[tile][1] = min(token + 2 * t + 1, args.m - 1) * groups;
    }

    float sums[Tiles][4] = {};
    for (int64_t unit = partial; unit * kUnitGroups < groups; unit += kPartials) {
      const int64_t end = min(groups, (unit + 1) * kUnitGroups);
#pragma unroll 4
      for (int64_t group = unit * kUnitGroups; group < end; ++group) {
        const int g = int(group % kBlockGroups);
        const uint8_t* blocks[2] = {rows[0] + group / kBlockGroups * Format::kBytes,
                                    rows[1] + group / kBlockGroups * Format::kBytes};
        const uint32_t a[4] = {Format::codes(blocks[0], g, t), Format::codes(blocks[1], g, t),
                               Format::codes(blocks[0], g, t + 4), Format::codes(blocks[1], g, t + 4)};
        const float scales[2] = {Format::scale(blocks[0], g), Format::scale(blocks[1], g)};
#pragma unroll
        for (int tile = 0; tile < Tiles; ++tile) {
          const uint32_t* word = reinterpret_cast<const uint32_t*>(codes[tile] + group * kGroup);
          const uint32_t b[2] = {word[0], word[4]};
          int dots[4] = {};
          if constexpr (kHalves) {
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
            const float group_scale = staged.scales[tokens[tile][i % 2] + group];
            sums[tile][i] = add_group(sums[tile][i], dots[i], scales[i / 2], group_scale);
            if constexpr (kMinima > 0) {
#pragma unroll
              for (int half = 0; half < kMinima; ++half) {
                const float sum = staged.sums[(tokens[tile][i % 2] + group) * kMinima + half];
                sums[tile][i] = add_minimum(sums[tile][i], Format::minimum(blocks[i / 2], g, half), sum);
              }
            }
          }
        }
      }
    }

#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        partials[partial][r + i / 2 * 8][tile * kTileTokens + 2 * t + i % 2] = sums[tile][i];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kTileRows * kTokens; i += kPartials * 32) {
      const int64_t row = first_row + i % kTileRows;
      const int64_t token = first_token + i / kTileRows;
      if (row >= args.nrows || token >= args.m) continue;
      float p[kPartials];
#pragma unroll
      for (int j = 0; j < kPartials; ++j) p[j] = partials[j][i % kTileRows][i / kTileRows];
      float y = meet(p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]);
      if (args.bias != nullptr) y = add(y, load_element(args.bias, row, args.y_type));
      store_element(args.y, token * args.y_stride + row, args.y_type, y);
    }
    __syncthreads();
  }
}

template <class Format>
int GgufOperations<Format>::matmul(const bcy_gguf_matmul_args& args, cudaStream_t stream) {
  const int64_t blocks = ceil_div(args.nrows, kTileRows);
  if (blocks > kMaxGridX) return BCY_ERROR_TOO_LARGE;
  const Staged staged = staged_planes(args.workspace, args.ncols, args.m);
  const auto with_tiles = [&](auto* kernel, int tiles) {
    const int64_t passes = min(ceil_div(args.m, tiles * kTileTokens), kMaxGridY);
    return launch(kernel, dim3(unsigned(blocks), unsigned(passes)), dim3(kPartials * 32), stream, args, staged);
  };
  if (args.m <= 8) return with_tiles(matmul_kernel<Format, 1>, 1);
  if (args.m <= 16) return with_tiles(matmul_kernel<Format, 2>, 2);
  return with_tiles(matmul_kernel<Format, 4>, 4);
}

}  // namespace bcy
