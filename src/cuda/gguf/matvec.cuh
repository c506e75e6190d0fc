// SPDX-License-Identifier: Apache-2.0
// y[m, n] = sum_k weight[n, k] * x[m, k] on float activations, as integers of 24 bits in each
// group: a product of integers for each of their three bytes.
#pragma once

#include <type_traits>

#include "cuda/common/activations.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/product.cuh"
#include "lanes.cuh"
#include "operations.h"
#include "staged.cuh"
#include "unit_words.cuh"

namespace bcy {

constexpr int kBytePlanes = 3;

// Whether a byte of an activation is multiplied as an unsigned one.
constexpr bool kUnsignedPlane[kBytePlanes] = {true, true, false};

// What one of the four lanes that hold a group of a token has of it: words t and t + 4.
struct FineWords {
  uint2 planes[kBytePlanes];
  float scale;
  float sums[2];  // of the whole group, or of its halves, where minima multiply them
};

// Four bytes, number `plane` of each integer.
template <int plane>
__device__ __forceinline__ uint32_t byte_plane(const int* codes) {
  constexpr uint32_t kSelect = plane | (4 + plane) << 4;
  return __byte_perm(__byte_perm(codes[0], codes[1], kSelect),
                     __byte_perm(codes[2], codes[3], kSelect), 0x5410);
}

// x: elements 4 t .. 4 t + 3 of a group and those plus 16. All lanes of a warp together.
template <int Minima>
__device__ __forceinline__ FineWords fine_words(const float (&x)[8]) {
  const GroupScale scale = scale_of_four_lanes<binary_scale<kFineBits>>(x);
  // As fine_element gives them: 0 times an infinity is NaN, which this conversion makes 0.
  int codes[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    codes[i] = min(__float2int_rn(mul(x[i], scale.inverse)), 0x7fffff);
  }
  FineWords words = {{{byte_plane<0>(codes), byte_plane<0>(codes + 4)},
                      {byte_plane<1>(codes), byte_plane<1>(codes + 4)},
                      {byte_plane<2>(codes), byte_plane<2>(codes + 4)}},
                     scale.scale,
                     {}};
  int totals[2] = {codes[0] + codes[1] + codes[2] + codes[3],
                   codes[4] + codes[5] + codes[6] + codes[7]};
  if constexpr (Minima == 1) totals[0] += totals[1];
#pragma unroll
  for (int i = 0; i < Minima; ++i) {
    words.sums[i] = staged_sum(scale, sum_of_four_lanes(totals[i]));
  }
  return words;
}

// The exact sum of the products of all three bytes, of which those of the high ones start at
// sum_start, less the factor 2^shift that codes carry, rounded to float32 once: the two parts that
// are added are exact.
__device__ __forceinline__ float sum_of_bytes(int low, int middle, int high, int shift) {
  const int lower = 256 * middle + low;
  const uint32_t base = 0x4b000000u - (uint32_t(shift) << 23);
  const float upper = as_float(uint32_t(high + (lower >> 16))) - as_float(sum_start(shift));
  return fma(upper, 65536.0f, as_float(uint32_t(lower & 0xffff) | base) - as_float(base));
}

struct FloatInputs {};

// 32 weight rows by 8 tokens. With r = lane / 4 and t = lane % 4 a lane holds the operands of rows
// r, r + 8, ... and of token r, which it makes as it goes, and the sums of those rows with tokens 2
// t and 2 t + 1. AtOnce: four activations from a multiple of four on can be loaded at once.
template <class F, class X, bool AtOnce>
class FloatTile : public TileDefaults {
 public:
  using Format = F;
  using Inputs = FloatInputs;
  static constexpr int kTokens = kTileTokens;
  static constexpr int kRowTiles = 2;
  static constexpr int kRows = kRowTiles * kTileRows;
  // With minima or scales of halves there are no registers for two.
  static constexpr int kBlocks = F::kMinima == 0 && F::kScaleElements == 32 ? 2 : 1;

  // Tokens past the end repeat the last one; their sums are not stored.
  __device__ __forceinline__ FloatTile(const ProductArgs& args, const FloatInputs&, int64_t,
                                       int64_t first_token, int first_unit, const uint8_t*) {
    const int64_t token = min(first_token + threadIdx.x % 32 / 4, args.m - 1);
    x_ = static_cast<const Storage*>(args.x) + token * args.x_stride + first_unit * kUnit +
         threadIdx.x % 4 * 4;
  }

  __device__ __forceinline__ void clear(int64_t) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) partial_[i][j] = 0.0f;
    }
  }

  template <class Row, class Read>
  __device__ __forceinline__ void add_unit(const RowsOf<Row, kRows>& rows, int round, int groups,
                                           int, Read read) {
    const Storage* const x = x_ + round * kPartials * kUnit;
    if (kBlockGroups == 1 && groups < kUnitGroups) {
#pragma unroll 1
      for (int group = 0; group < groups; ++group) {
        using Moved = decltype(rows.row[0].template moved<Format::kAlignment>(0));
        RowsOf<Moved, kRows> blocks;
#pragma unroll
        for (int i = 0; i < 2 * kRowTiles; ++i) {
          blocks.row[i] = rows.row[i].template moved<Format::kAlignment>(group * Format::kBytes);
        }
        add_group(blocks, 0, x + group * kGroup);
      }
    } else {
#pragma unroll
      for (int group = 0; group < kUnitGroups; ++group) add_group(rows, group, x + group * kGroup);
    }
    read();
  }

  __device__ __forceinline__ void store(
      float (&partials)[kTokens][Meeting<kRows, kTokens>::kPitch]) const {
    const int r = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        partials[2 * t + j % 2][i * kTileRows + r + j / 2 * 8] = partial_[i][j];
      }
    }
  }

 private:
  using Storage = typename X::Storage;
  static constexpr int kMinima = Format::kMinima;
  static constexpr int kBlockGroups = Format::kElements / kGroup;
  static constexpr int kHalves = kGroup / Format::kScaleElements;

  template <class Row>
  __device__ __forceinline__ void add_group(const RowsOf<Row, kRows>& rows, int group,
                                            const Storage* from) {
    const int t = threadIdx.x % 4, g = group % kBlockGroups;
    float x[8];
    load_four<X>(from, AtOnce, x);
    load_four<X>(from + kGroup / 2, AtOnce, x + 4);
    const FineWords words = fine_words<kMinima>(x);
    const auto of_token = [&](float value, int j) {
      return __shfl_sync(~0u, value, 8 * t + 4 * j);
    };
    const float x_scales[2] = {of_token(words.scale, 0), of_token(words.scale, 1)};
    [[maybe_unused]] float x_sums[2][2];
#pragma unroll
    for (int i = 0; i < kMinima; ++i) {
      x_sums[i][0] = of_token(words.sums[i], 0);
      x_sums[i][1] = of_token(words.sums[i], 1);
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      const int offset = group / kBlockGroups * Format::kBytes;
      const Row blocks[2] = {rows.row[2 * i] + offset, rows.row[2 * i + 1] + offset};
      uint32_t a[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) a[j] = Format::codes(blocks[j % 2], g, j / 2, t);
      int dots[kHalves][kBytePlanes][4] = {};
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
#pragma unroll
        for (int j = 0; j < 4; ++j) dots[half][2][j] = int(sum_start(Format::shift(g)));
      }
      multiply<0>(dots, a, words);
      multiply<1>(dots, a, words);
      multiply<2>(dots, a, words);
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const float scales[2] = {fine_scale<Format>(blocks[0], g, half),
                                 fine_scale<Format>(blocks[1], g, half)};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const auto& dot = dots[half];
          const float value = sum_of_bytes(dot[0][j], dot[1][j], dot[2][j], Format::shift(g));
          partial_[i][j] = add_fine_group(partial_[i][j], value, scales[j / 2], x_scales[j % 2]);
        }
      }
      if constexpr (kMinima > 0) {
#pragma unroll
        for (int half = 0; half < kMinima; ++half) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            partial_[i][j] = add_minimum(partial_[i][j], Format::minimum(blocks[j / 2], g, half),
                                         x_sums[half][j % 2]);
          }
        }
      }
    }
  }

  template <int plane>
  static __device__ __forceinline__ void multiply(int (&dots)[kHalves][kBytePlanes][4],
                                                  const uint32_t (&a)[4], const FineWords& words) {
    const uint32_t b[2] = {words.planes[plane].x, words.planes[plane].y};
    if constexpr (kHalves == 1) {
      mma_group<Format::kUnsignedCodes, kUnsignedPlane[plane]>(dots[0][plane], a, b);
    } else {
      mma_half<Format::kUnsignedCodes, kUnsignedPlane[plane]>(dots[0][plane], a[0], a[1], b[0]);
      mma_half<Format::kUnsignedCodes, kUnsignedPlane[plane]>(dots[1][plane], a[2], a[3], b[1]);
    }
  }

  const Storage* x_;  // this lane's first element in this warp's first unit
  float partial_[kRowTiles][4];
};

// Few tokens, a row of weights to each lane, and the activations, which all lanes share, in shared
// memory. For a ring that gives each lane a row.
template <class F, int Tokens>
class FloatLaneTile : public TileDefaults {
 public:
  using Format = F;
  using Inputs = FloatInputs;
  static constexpr int kTokens = Tokens;
  static constexpr int kRows = kLaneRows;
  static constexpr int kBlocks = 2;
  static constexpr bool kReadsMost = Tokens == 1 && reads_most<Format>;
  static constexpr bool kBringsLong = Tokens == 1;

  static int64_t activation_bytes(int64_t ncols) {
    return unit_count(ncols) * int64_t{sizeof(Unit)};
  }

  // Each warp brings in the units that it alone reads.
  static __device__ __forceinline__ void bring_activations(const ProductArgs& args,
                                                           const FloatInputs&, int64_t,
                                                           uint8_t* memory) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const auto put = [&](const float (&x)[8], int64_t token, int64_t unit) {
      const FineWords words = fine_words<kMinima>(x);
      Record& record = reinterpret_cast<Unit*>(memory)[unit].tokens[token];
#pragma unroll
      for (int plane = 0; plane < kBytePlanes; ++plane) {
        const uint2 two = words.planes[plane];
        record.words[g][plane][t] = gives_turns<Format> ? in_turns(two) : two;
      }
      if (t == 0) {
        record.scales[g] = words.scale;
#pragma unroll
        for (int i = 0; i < kMinima; ++i) record.sums[g][i] = words.sums[i];
      }
    };
    with_own_units(args, true, int(unit_count(args.ncols)), Tokens, put);
  }

  __device__ __forceinline__ FloatLaneTile(const ProductArgs&, const FloatInputs&, int64_t, int64_t,
                                           int first_unit, const uint8_t* memory)
      : units_(reinterpret_cast<const Unit*>(memory) + first_unit) {
    if constexpr (gives_turns<Format>) table_ = in_registers(Format::table());
  }

  __device__ __forceinline__ void clear(int64_t) {
#pragma unroll
    for (float& partial : partial_) partial = 0.0f;
  }

  // row: of this lane, one unit.
  template <class Row, class Read>
  __device__ __forceinline__ void add_unit(const Row& row, int round, int groups, int, Read read) {
    const Unit& x = units_[round * kPartials];
    // Only formats whose blocks are groups have units that end early.
    if (kBlockGroups == 1 && groups < kUnitGroups) {
#pragma unroll 1
      for (int group = 0; group < groups; ++group) {
        add_group(row.template moved<Format::kAlignment>(group * Format::kBytes), 0, x, group);
      }
      read();
      return;
    }
    uint32_t words[kUnitWords<Format>];
    load_unit_words<Format>(row, words);
#pragma unroll
    for (int group = 0; group < kUnitGroups; ++group) {
      add_group(WordBytes{words, group / kBlockGroups * Format::kBytes}, group % kBlockGroups, x,
                group);
    }
    read();
  }

  __device__ __forceinline__ void store(
      float (&partials)[Tokens][Meeting<kRows, Tokens>::kPitch]) const {
#pragma unroll
    for (int token = 0; token < Tokens; ++token) {
      partials[token][threadIdx.x % 32] = partial_[token];
    }
  }

 private:
  static constexpr int kMinima = Format::kMinima;
  static constexpr int kBlockGroups = Format::kElements / kGroup;
  static constexpr int kHalves = kGroup / Format::kScaleElements;

  // What a token has of a unit: words t and t + 4 for each t, by group and byte.
  struct alignas(16) Record {
    uint2 words[kUnitGroups][kBytePlanes][4];
    float scales[kUnitGroups];
    float sums[kMinima > 0 ? kUnitGroups : 0][kMinima > 0 ? kMinima : 1];
  };
  struct Unit {
    Record tokens[Tokens];
  };

  template <class Block>
  __device__ __forceinline__ void add_group(Block block, int g, const Unit& x, int group) {
    int dots[Tokens][kHalves][kBytePlanes] = {};
#pragma unroll
    for (auto& of_token : dots) {
#pragma unroll
      for (auto& dot : of_token) dot[2] = int(sum_start(Format::shift(g)));
    }
#pragma unroll
    for (int t = 0; t < 4; t += 2) {
      uint32_t codes[4];
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        if constexpr (gives_turns<Format>) {
          const uint2 turns = look_up_by_turns(table_, Format::nibbles(block, g, t + j / 2));
          codes[j] = turns.x;
          codes[j + 1] = turns.y;
        } else {
          codes[j] = Format::codes(block, g, 0, t + j / 2);
          codes[j + 1] = Format::codes(block, g, 1, t + j / 2);
        }
      }
#pragma unroll
      for (int token = 0; token < Tokens; ++token) {
        const auto& words = x.tokens[token].words[group];
        multiply<0>(dots[token], codes, words[0] + t);
        multiply<1>(dots[token], codes, words[1] + t);
        multiply<2>(dots[token], codes, words[2] + t);
      }
    }
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const float scale = fine_scale<Format>(block, g, half);
#pragma unroll
      for (int token = 0; token < Tokens; ++token) {
        const auto& dot = dots[token][half];
        const float value = sum_of_bytes(dot[0], dot[1], dot[2], Format::shift(g));
        const float x_scale = x.tokens[token].scales[group];
        partial_[token] = add_fine_group(partial_[token], value, scale, x_scale);
      }
    }
    if constexpr (kMinima > 0) {
#pragma unroll
      for (int half = 0; half < kMinima; ++half) {
        const float minimum = Format::minimum(block, g, half);
#pragma unroll
        for (int token = 0; token < Tokens; ++token) {
          partial_[token] =
              add_minimum(partial_[token], minimum, x.tokens[token].sums[group][half]);
        }
      }
    }
  }

  // Words t and t + 4, t + 1 and t + 5.
  template <int plane>
  static __device__ __forceinline__ void multiply(int (&dots)[kHalves][kBytePlanes],
                                                  const uint32_t (&codes)[4], const uint2* from) {
    const uint4 x = *reinterpret_cast<const uint4*>(from);
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      int& dot = dots[kHalves == 2 ? j % 2 : 0][plane];
      dot = dot_of_four<Format::kUnsignedCodes, kUnsignedPlane[plane]>(codes[j], words[j], dot);
    }
  }

  const Unit* units_;  // this warp's first
  Table16 table_;      // of formats that have one
  float partial_[Tokens];
};

template <class Format>
int GgufOperations<Format>::matvec(const ProductArgs& args, const Device& device,
                                   cudaStream_t stream) {
  const bool at_once = loads_at_once(args, 4);
  // extra: bytes of activations in shared memory.
  const auto streamed = [&](auto* tile, auto* ring, int64_t extra) {
    using Tile = std::remove_pointer_t<decltype(tile)>;
    using Ring = std::remove_pointer_t<decltype(ring)>;
    const bool overlap = args.overlap != 0;
    return launch_streamed<Tile, Ring>(args, FloatInputs{}, device, int(extra), overlap, overlap,
                                       stream);
  };
  return with_element(args.x_type, [&](auto x) {
    using X = decltype(x);
    FloatTile<Format, X, false>* const any_tokens = nullptr;
    if (device.arch < 800) return launch_direct(any_tokens, args, FloatInputs{}, stream);
    constexpr int kMostInLanes = 2;  // tokens
    if (args.m <= kMostInLanes && has_copies(args, device) && at_once) {
      const int64_t extra = args.m * FloatLaneTile<Format, 1>::activation_bytes(args.ncols);
      const bool fits = with_lane_ring<Format>(args, [&](auto* ring) {
        return int(holds<FloatLaneTile<Format, kMostInLanes>>(ring, 2, extra, device));
      });
      if (fits) {
        return with_lane_tokens<kMostInLanes>(args.m, [&](auto tokens) {
          constexpr int kTokens = decltype(tokens)::value;
          return with_lane_ring<Format>(args, [&](auto* ring) {
            return streamed(static_cast<FloatLaneTile<Format, kTokens>*>(nullptr), ring, extra);
          });
        });
      }
    }
    if (!rows_on_boundaries<Format>(args) || !at_once) {
      return streamed(any_tokens, static_cast<RowRing<Format, 32, false>*>(nullptr), 0);
    }
    return streamed(static_cast<FloatTile<Format, X, true>*>(nullptr),
                    static_cast<RowRing<Format, 32, true>*>(nullptr), 0);
  });
}

}  // namespace bcy
