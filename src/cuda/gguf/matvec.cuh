// SPDX-License-Identifier: Apache-2.0
// y[m, n] = sum_k weight[n, k] * x[m, k] on float activations.
#pragma once

#include <type_traits>

#include "cuda/common/activations.cuh"
#include "cuda/common/product.cuh"
#include "operations.h"
#include "unit_words.cuh"

namespace bcy {

struct FloatInputs {};

// A lane holds rows r and r + 8 and eight element positions of a group: 4 t .. 4 t + 3
// and those plus 16, the two words that packed nibbles keep together (r = lane / 4, t = lane % 4).
// Each position is a partial sum of its own. AtOnce: four elements of x from a multiple of four on
// can be loaded at once.
template <class F, class X, int Tokens, bool AtOnce>
class FloatTile : public TileDefaults {
 public:
  using Format = F;
  using Inputs = FloatInputs;
  static constexpr int kTokens = Tokens;
  static constexpr int kRows = kTileRows;
  static constexpr int kBlocks = Tokens == 1 ? 2 : 1;
  static constexpr bool kStartsNextAtOnce = Tokens == 1;

  // Tokens past the end repeat the last one; their sums are not stored.
  __device__ __forceinline__ FloatTile(const ProductArgs& args, const FloatInputs&, int64_t,
                                       int64_t first_token, int first_unit, const uint8_t*) {
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
      for (int i = 0; i < kOctets; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) sums_[token][i][j] = 0.0f;
      }
    }
  }

  template <class Row, class Read>
  __device__ __forceinline__ void add_unit(const RowsOf<Row, kRows>& rows, int round, int groups,
                                           int, Read read) {
    if (kBlockGroups == 1 && groups < kUnitGroups) {
#pragma unroll 1
      for (int group = 0; group < groups; ++group) {
        using Moved = decltype(rows.row[0].template moved<Format::kAlignment>(0));
        RowsOf<Moved, kRows> blocks;
#pragma unroll
        for (int i = 0; i < kOctets; ++i) {
          blocks.row[i] = rows.row[i].template moved<Format::kAlignment>(group * Format::kBytes);
        }
        add_group(blocks, 0, round * kPartials * kUnit + group * kGroup);
      }
    } else {
#pragma unroll
      for (int group = 0; group < kUnitGroups; ++group) {
        add_group(rows, group, round * kPartials * kUnit + group * kGroup);
      }
    }
    read();
  }

  // Element positions meet, halved: 16 apart in this lane, 8 and 4 apart in its neighbours, then 2
  // and 1.
  __device__ __forceinline__ void store(
      float (&partials)[Tokens][Meeting<kRows, Tokens>::kPitch]) const {
#pragma unroll
    for (int token = 0; token < Tokens; ++token) {
#pragma unroll
      for (int i = 0; i < kOctets; ++i) {
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
  static constexpr int kOctets = kRows / 8;

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
    for (int i = 0; i < kOctets; ++i) {
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
  float sums_[Tokens][kOctets][8];
};

// One token, a row of weights to each lane: the 32 element positions of a group are sums of its
// own, and the activations, which all lanes share, lie in shared memory as float32. For a LaneRing.
template <class F, class X>
class FloatLaneTile : public TileDefaults {
 public:
  using Format = F;
  using Inputs = FloatInputs;
  static constexpr int kTokens = 1;
  static constexpr int kRows = kLaneRows;
  static constexpr int kBlocks = 2;

  // Each warp brings in the units that it alone reads.
  static __device__ __forceinline__ void bring_activations(const ProductArgs& args,
                                                           const FloatInputs&, int64_t,
                                                           uint8_t* memory) {
    const auto* const x = static_cast<const typename X::Storage*>(args.x);
    const int ncols = int(args.ncols);
#pragma unroll 2
    for (int unit = threadIdx.x / 32; unit * kUnit < ncols; unit += kPartials) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int k = unit * kUnit + half * (kUnit / 2) + threadIdx.x % 32 * 4;
        if (k >= ncols) continue;
        float four[4];
        load_four<X>(x + k, true, four);
        reinterpret_cast<float4*>(memory)[k / 4] = {four[0], four[1], four[2], four[3]};
      }
    }
    __syncwarp();
  }

  __device__ __forceinline__ FloatLaneTile(const ProductArgs&, const FloatInputs&, int64_t, int64_t,
                                           int first_unit, const uint8_t* memory)
      : x_(reinterpret_cast<const float4*>(memory) + first_unit * (kUnit / 4)) {}

  __device__ __forceinline__ void clear(int64_t) {
#pragma unroll
    for (int e = 0; e < kGroup; ++e) sums_[e] = 0.0f;
  }

  // row: of this lane, one unit.
  template <class Row, class Read>
  __device__ __forceinline__ void add_unit(const Row& row, int round, int groups, int, Read read) {
    const float4* const x = x_ + round * (kPartials * kUnit / 4);
    // Only formats whose blocks are groups have units that end early.
    if (kBlockGroups == 1 && groups < kUnitGroups) {
#pragma unroll 1
      for (int group = 0; group < groups; ++group) {
        add_group(row.template moved<Format::kAlignment>(group * Format::kBytes), 0,
                  x + group * (kGroup / 4));
      }
      read();
      return;
    }
    uint32_t words[kUnitWords<Format>];
    load_unit_words<Format>(row, words);
#pragma unroll
    for (int group = 0; group < kUnitGroups; ++group) {
      add_group(WordBytes{words, group / kBlockGroups * Format::kBytes}, group % kBlockGroups,
                x + group * (kGroup / 4));
    }
    read();
  }

  // Element positions meet, halved: 16 apart, then 8, 4, 2 and 1.
  __device__ __forceinline__ void store(float (&partials)[1][Meeting<kRows, 1>::kPitch]) const {
    float s[kGroup / 2];
#pragma unroll
    for (int e = 0; e < kGroup / 2; ++e) s[e] = add(sums_[e], sums_[e + kGroup / 2]);
#pragma unroll
    for (int halving = 0; halving < 4; ++halving) {
      const int apart = kGroup / 4 >> halving;
#pragma unroll
      for (int e = 0; e < kGroup / 4; ++e) {
        if (e < apart) s[e] = add(s[e], s[e + apart]);
      }
    }
    partials[0][threadIdx.x % 32] = s[0];
  }

 private:
  static constexpr int kBlockGroups = Format::kElements / kGroup;

  template <class Block>
  __device__ __forceinline__ void add_group(Block block, int group, const float4* x) {
#pragma unroll
    for (int word = 0; word < kGroup / 4; ++word) {
      const float4 four = x[word];
      float weights[4];
      dequantize_word<Format>(block, group, word / 4, word % 4, weights);
      float* const sums = sums_ + 4 * word;
      sums[0] = fma(weights[0], four.x, sums[0]);
      sums[1] = fma(weights[1], four.y, sums[1]);
      sums[2] = fma(weights[2], four.z, sums[2]);
      sums[3] = fma(weights[3], four.w, sums[3]);
    }
  }

  const float4* x_;  // of this warp's first unit
  float sums_[kGroup];
};

// Whether a lane has the registers for a row.
template <class Format>
constexpr bool kFloatsInLanes = true;
template <>
inline constexpr bool kFloatsInLanes<Q6_K> = false;

// Activations of a token that lie in shared memory.
constexpr int64_t kMostFloatsInLanes = 16 << 10;

template <class Format>
int GgufOperations<Format>::matvec(const ProductArgs& args, cudaStream_t stream) {
  Device device;
  if (const int status = look_at_device(args.device, device)) return status;
  return with_element(args.x_type, [&](auto x) {
    using X = decltype(x);
    // extra: bytes of activations in shared memory.
    const auto streamed = [&](auto* tile, auto* ring, int64_t extra) {
      using Tile = std::remove_pointer_t<decltype(tile)>;
      using Ring = std::remove_pointer_t<decltype(ring)>;
      const bool overlap = args.overlap != 0;
      return launch_streamed<Tile, Ring>(args, FloatInputs{}, device, int(extra), overlap, overlap,
                                         stream);
    };
    constexpr int kMany = sizeof(typename X::Storage) == 4 ? 2 : 4;  // tokens
    FloatTile<Format, X, kMany, false>* const any_tokens = nullptr;
    if (device.arch < 800) return launch_direct(any_tokens, args, FloatInputs{}, stream);
    if (!rows_on_boundaries<Format>(args) || !loads_at_once(args, 4)) {
      return streamed(any_tokens, static_cast<RowRing<Format, 16, false>*>(nullptr), 0);
    }
    RowRing<Format, 16, true>* const rows = nullptr;
    if (args.m > 1) {
      return streamed(static_cast<FloatTile<Format, X, kMany, true>*>(nullptr), rows, 0);
    }
    if constexpr (kFloatsInLanes<Format>) {
      if (device.arch >= LaneRing<Format>::kOldestArch && args.ncols > 0 &&
          args.ncols <= kMostFloatsInLanes && args.nrows <= INT32_MAX) {  // places in boxes
        return streamed(static_cast<FloatLaneTile<Format, X>*>(nullptr),
                        static_cast<LaneRing<Format>*>(nullptr),
                        ceil_div(args.ncols, kUnit) * kUnit * sizeof(float));
      }
    }
    return streamed(static_cast<FloatTile<Format, X, 1, true>*>(nullptr), rows, 0);
  });
}

}  // namespace bcy
