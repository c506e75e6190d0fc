// SPDX-License-Identifier: Apache-2.0
// y[m, n] = sum_k weight[n, k] * x[m, k] on float activations.
#pragma once

#include <type_traits>

#include "cuda/common/activations.cuh"
#include "cuda/common/product.cuh"
#include "operations.h"

namespace bcy {

struct FloatInputs {};

// A lane holds rows r, r + 8, r + 16, ... and eight element positions of a group: 4 t .. 4 t + 3
// and those plus 16, the two words that packed nibbles keep together (r = lane / 4, t = lane % 4).
// Each position is a partial sum of its own. AtOnce: four elements of x from a multiple of four on
// can be loaded at once.
template <class F, class X, int Tokens, int RowTiles, bool AtOnce>
class FloatTile {
 public:
  using Format = F;
  using Inputs = FloatInputs;
  static constexpr int kTokens = Tokens;
  static constexpr int kRows = RowTiles * kTileRows;
  static constexpr int kBlocks = Tokens == 1 ? 2 : 1;

  static __device__ __forceinline__ void prefetch(const bcy_gguf_matmul_args&, const FloatInputs&,
                                                  int64_t, int) {}
  static __device__ __forceinline__ void prepare(const bcy_gguf_matmul_args&, const FloatInputs&,
                                                 uint8_t*) {
    wait_for_previous_kernel();
  }

  // Tokens past the end repeat the last one; their sums are not stored.
  __device__ __forceinline__ FloatTile(const bcy_gguf_matmul_args& args, const FloatInputs&,
                                       int64_t, int64_t first_token, int first_unit,
                                       const uint8_t*) {
#pragma unroll
    for (int token = 0; token < Tokens; ++token) {
      x_[token] = static_cast<const Storage*>(args.x) +
                  min(first_token + token, args.m - 1) * args.x_stride + first_unit * kUnit +
                  threadIdx.x % 4 * 4;
    }
  }

  __device__ __forceinline__ void clear(int64_t) {
#pragma unroll
    for (int token = 0; token < Tokens; ++token) {
#pragma unroll
      for (int i = 0; i < 2 * RowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) sums_[token][i][j] = 0.0f;
      }
    }
  }

  template <class Row>
  __device__ __forceinline__ void add_unit(const RowsOf<Row, kRows>& rows, int round, int groups,
                                           int) {
    if (kBlockGroups == 1 && groups < kUnitGroups) {
#pragma unroll 1
      for (int group = 0; group < groups; ++group) {
        using Moved = decltype(rows.row[0].template moved<Format::kAlignment>(0));
        RowsOf<Moved, kRows> blocks;
#pragma unroll
        for (int i = 0; i < 2 * RowTiles; ++i) {
          blocks.row[i] = rows.row[i].template moved<Format::kAlignment>(group * Format::kBytes);
        }
        add_group(blocks, 0, round * kPartials * kUnit + group * kGroup);
      }
      return;
    }
#pragma unroll
    for (int group = 0; group < kUnitGroups; ++group) {
      add_group(rows, group, round * kPartials * kUnit + group * kGroup);
    }
  }

  // Element positions meet, halved: 16 apart in this lane, 8 and 4 apart in its neighbours, then 2
  // and 1.
  __device__ __forceinline__ void store(
      float (&partials)[Tokens][Meeting<kRows, Tokens>::kPitch]) const {
#pragma unroll
    for (int token = 0; token < Tokens; ++token) {
#pragma unroll
      for (int i = 0; i < 2 * RowTiles; ++i) {
        float s[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          s[j] = add(sums_[token][i][j], sums_[token][i][j + 4]);
          s[j] = add(s[j], __shfl_xor_sync(~0u, s[j], 2));
          s[j] = add(s[j], __shfl_xor_sync(~0u, s[j], 1));
        }
        if (threadIdx.x % 4 == 0) {
          partials[token][threadIdx.x % 32 / 4 + 8 * i] = add(add(s[0], s[2]), add(s[1], s[3]));
        }
      }
    }
  }

 private:
  using Storage = typename X::Storage;
  static constexpr int kBlockGroups = Format::kElements / kGroup;

  template <class Row>
  __device__ __forceinline__ void add_group(const RowsOf<Row, kRows>& rows, int group,
                                            int first_element) {
    const int t = threadIdx.x % 4;
    float values[Tokens][8];
#pragma unroll
    for (int token = 0; token < Tokens; ++token) {
      load_four<X>(x_[token] + first_element, AtOnce, values[token]);
      load_four<X>(x_[token] + first_element + 16, AtOnce, values[token] + 4);
    }
#pragma unroll
    for (int i = 0; i < 2 * RowTiles; ++i) {
      const auto block = rows.row[i] + group / kBlockGroups * Format::kBytes;
      float weights[8];
      dequantize_word<Format>(block, group % kBlockGroups, 0, t, weights);
      dequantize_word<Format>(block, group % kBlockGroups, 1, t, weights + 4);
#pragma unroll
      for (int token = 0; token < Tokens; ++token) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          sums_[token][i][j] = fma(weights[j], values[token][j], sums_[token][i][j]);
        }
      }
    }
  }

  const Storage* x_[Tokens];  // this lane's first element in this warp's first unit
  float sums_[Tokens][2 * RowTiles][8];
};

template <class Format>
int GgufOperations<Format>::matvec(const bcy_gguf_matmul_args& args, cudaStream_t stream) {
  Device device;
  if (const int status = look_at_device(args.device, device)) return status;
  const bool regular = rows_on_boundaries<Format>(args) && loads_at_once(args, 4);
  return with_element(args.x_type, [&](auto x) {
    using X = decltype(x);
    const auto run = [&](auto* tile, auto* ring) {
      using Tile = std::remove_pointer_t<decltype(tile)>;
      using Ring = std::remove_pointer_t<decltype(ring)>;
      if (device.arch < 800) return launch_direct(tile, args, FloatInputs{}, stream);
      const bool overlap = args.overlap != 0;
      return launch_streamed<Tile, Ring>(args, FloatInputs{}, device, 0, overlap, overlap, stream);
    };
    constexpr int kMany = sizeof(typename X::Storage) == 4 ? 2 : 4;  // tokens
    if (!regular || device.arch < 800) {
      return run(static_cast<FloatTile<Format, X, kMany, 1, false>*>(nullptr),
                 static_cast<RowRing<Format, 16, false>*>(nullptr));
    }
    if (args.m > 1) {
      return run(static_cast<FloatTile<Format, X, kMany, 1, true>*>(nullptr),
                 static_cast<RowRing<Format, 16, true>*>(nullptr));
    }
    // Two tiles of rows share what is loaded of x, where there are rows enough, and registers.
    constexpr bool kLarge = Format::kMinima > 0 || Format::kScaleElements == 16;
    if (!kLarge && args.nrows >= 3 * 32 * int64_t{device.processors}) {
      constexpr int kRowTiles = kLarge ? 1 : 2;
      return run(static_cast<FloatTile<Format, X, 1, kRowTiles, true>*>(nullptr),
                 static_cast<RowRing<Format, kRowTiles * kTileRows, true>*>(nullptr));
    }
    return run(static_cast<FloatTile<Format, X, 1, 1, true>*>(nullptr),
               static_cast<RowRing<Format, 16, true>*>(nullptr));
  });
}

}  // namespace bcy
