// SPDX-License-Identifier: Apache-2.0
// The product of one staged token, or a few, with a row of weights to each lane.
//
// Tensor cores take eight tokens at a time, and four lanes each unpack the scales of a row for
// them. Where there are fewer it takes half the instructions that a lane has the row to itself and
// multiplies four codes at a time: the integers of a group are exact either way, and the order in
// which groups are added is the same, so the bits are too.
#pragma once

#include <type_traits>

#include "cuda/common/product.cuh"
#include "operands.cuh"
#include "staged.cuh"
#include "unit_words.cuh"

namespace bcy {

// Of all tokens, which lie in shared memory, each in records of its own.
constexpr int64_t kMostStagedInLanes = 64 << 10;

// Calls function(std::integral_constant<int, m>{}).
template <int Most, class Function>
int with_lane_tokens(int64_t m, Function&& function) {
  if constexpr (Most > 1) {
    if (m < Most) return with_lane_tokens<Most - 1>(m, function);
  }
  return function(std::integral_constant<int, Most>{});
}

// Calls function(ring).
template <class Format, class Function>
int with_lane_ring(const ProductArgs& args, Function&& function) {
  return rows_on_boundaries<Format>(args) ? function(static_cast<LaneRing<Format>*>(nullptr))
                                          : function(static_cast<LaneAnyRing<Format>*>(nullptr));
}

// 32 rows by a few tokens, for a ring that gives each lane a row.
template <class F, int Tokens>
class LaneTile : public TileDefaults {
 public:
  using Format = F;
  using Inputs = Staged;
  static constexpr int kTokens = Tokens;
  static constexpr int kRows = kLaneRows;
  static constexpr int kBlocks = 2;
  static constexpr bool kReadsMost = Tokens == 1 && reads_most<Format>;

  static int64_t activation_bytes(int64_t ncols) {
    return Tokens * staged_bytes<Format>(ncols, 1) + kPartials * int64_t{sizeof(uint64_t)};
  }

  // A warp brings the units that it takes, and waits for these alone.
  static __device__ __forceinline__ void bring_activations(const ProductArgs& args,
                                                           const Staged& staged, int64_t,
                                                           uint8_t* memory) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (staged.fused) {
      stage_own_units<1, kSums>(args, staged, memory, Tokens);
      return;
    }
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, units = int(staged.units);
    // Behind the activations; no other warp knows it.
    auto* const barrier =
        reinterpret_cast<uint64_t*>(memory + Tokens * units * Record::kBytes) + warp;
    if (lane == 0) {
      barrier_init(barrier, 32);
      barrier_init_fence();
    }
    __syncwarp();
    const auto each = [&](auto function) {
      for (int unit = warp + lane * kPartials; unit < units; unit += 32 * kPartials) {
#pragma unroll
        for (int token = 0; token < Tokens; ++token) {
          function((token * units + unit) * Record::kBytes);
        }
      }
    };
    uint32_t bytes = 0;
    each([&](int) { bytes += Record::kBytes; });
    expect_bytes(barrier, bytes);
    each([&](int at) { copy_row(memory + at, staged.records + at, Record::kBytes, barrier); });
    barrier_wait(barrier, 0);
#endif
  }

  __device__ __forceinline__ LaneTile(const ProductArgs&, const Staged& staged, int64_t, int64_t,
                                      int first_unit, const uint8_t* memory) {
#pragma unroll
    for (int token = 0; token < Tokens; ++token) {
      records_[token] = memory + (token * int(staged.units) + first_unit) * Record::kBytes;
    }
    if constexpr (gives_turns<Format>) table_ = in_registers(in_two_addends(Format::table()));
  }

  __device__ __forceinline__ void clear(int64_t) {
#pragma unroll
    for (int token = 0; token < Tokens; ++token) partial_[token] = 0.0f;
  }

  // row: of this lane, one unit.
  template <class Row, class Read>
  __device__ __forceinline__ void add_unit(const Row& row, int round, int groups, int, Read read) {
    // Only formats whose blocks are groups have units that end early.
    if (kBlockGroups == 1 && groups < kUnitGroups) {
#pragma unroll 1
      for (int group = 0; group < groups; ++group) {
        const Activations x(records_, round, group / 2);
        const auto block = row.template moved<Format::kAlignment>(group * Format::kBytes);
        if (group % 2 == 0) {
          add_group<0>(block, 0, x);
        } else {
          add_group<1>(block, 0, x);
        }
      }
      read();
      return;
    }
    uint32_t words[kUnitWords<Format>];
    load_unit_words<Format>(row, words);
    // Then all words are in registers, where there is room for them.
    constexpr bool kAhead = kUnitWords<Format> <= 48;
    if (kAhead) read();
    const auto block = [&](int group) {
      return WordBytes{words, group / kBlockGroups * Format::kBytes};
    };
#pragma unroll
    for (int group = 0; group < kUnitGroups; group += 2) {
      const Activations x(records_, round, group / 2);
      add_group<0>(block(group), group % kBlockGroups, x);
      add_group<1>(block(group + 1), (group + 1) % kBlockGroups, x);
    }
    if constexpr (kSums > 1) add_minima(block(0), round);
    if (!kAhead) read();
  }

  __device__ __forceinline__ void store(
      float (&partials)[Tokens][Meeting<kRows, Tokens>::kPitch]) const {
#pragma unroll
    for (int token = 0; token < Tokens; ++token) {
      partials[token][threadIdx.x % 32] = partial_[token];
    }
  }

 private:
  static constexpr int kSums = kStagedSums<Format>;
  using Record = StagedRecord<1, kSums>;
  static constexpr int kBlockGroups = Format::kElements / kGroup;
  static constexpr bool kHalves = Format::kScaleElements == 16;

  // Staged activations of two groups: words t and t + 4 of the first, then of the second.
  struct Activations {
    uint4 codes[Tokens][4];
    float2 scales[Tokens];
    float2 sums[Tokens];  // of groups

    __device__ __forceinline__ Activations(const uint8_t* const (&records)[Tokens], int round,
                                           int pair) {
#pragma unroll
      for (int token = 0; token < Tokens; ++token) {
        const uint8_t* const record = records[token] + round * (kPartials * Record::kBytes);
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          codes[token][t] = reinterpret_cast<const uint4*>(record + pair * Record::kCodes)[t];
        }
        const auto floats = [&](int plane) {
          return *reinterpret_cast<const float2*>(record + plane);
        };
        scales[token] = floats(Record::kScalesAt + pair * Record::kScales);
        if (kSums == 1) sums[token] = floats(Record::kSumsAt + pair * Record::kScales);
      }
    }
  };

  // Group g of a block times group Which of a pair.
  template <int Which, class Block>
  __device__ __forceinline__ void add_group(Block block, int g, const Activations& x) {
    const int shift = Format::shift(g);
    int dots[Tokens][2];
#pragma unroll
    for (int token = 0; token < Tokens; ++token) {
      dots[token][0] = kHalves ? 0 : int(sum_start(shift));
      dots[token][1] = 0;
    }
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      // One or two, which add up to the codes.
      constexpr int kAddends = gives_turns<Format> ? 2 : 1;
      uint32_t codes[kAddends][2];
      if constexpr (gives_turns<Format>) {
        const TurnsInAddends addends = look_up_in_addends(table_, Format::nibbles(block, g, t));
        codes[0][0] = addends.first.x;
        codes[0][1] = addends.first.y;
        codes[1][0] = addends.second.x;
        codes[1][1] = addends.second.y;
      } else {
        codes[0][0] = Format::codes(block, g, 0, t);
        codes[0][1] = Format::codes(block, g, 1, t);
      }
#pragma unroll
      for (int token = 0; token < Tokens; ++token) {
        const uint4 words = x.codes[token][t];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t word = Which ? (half ? words.w : words.z) : (half ? words.y : words.x);
          int& dot = dots[token][kHalves ? half : 0];
#pragma unroll
          for (int i = 0; i < kAddends; ++i) {
            dot = dot_of_four<Format::kUnsignedCodes>(codes[i][half], word, dot);
          }
        }
      }
    }
    const float scale = Format::scale(block, g);
    const SumScale<Format> sum_scale(scale, shift);
    const auto element = [](float2 two) { return Which ? two.y : two.x; };
#pragma unroll
    for (int token = 0; token < Tokens; ++token) {
      float value;
      if constexpr (kHalves) {
        // Below 2^24 but for the factor 2^shift.
        const int dot = half_scale<Format>(block, g, 0) * dots[token][0] +
                        half_scale<Format>(block, g, 1) * dots[token][1];
        value = mul(float(dot), as_float(uint32_t(127 - shift) << 23));
        value = scaled(value, finite_or_nan(scale));
      } else {
        value = sum_scale.times(dots[token][0]);
      }
      float& partial = partial_[token];
      partial = fma(value, element(x.scales[token]), partial);
      if constexpr (kSums == 1) {
        partial = add_minimum(partial, Format::minimum(block, g, 0), element(x.sums[token]));
      }
    }
  }

  // The integer minima of a unit.
  template <class Block>
  __device__ __forceinline__ void add_minima(Block block, int round) {
    const SumScale<Format> scale(Format::minimum_scale(block), 0);
#pragma unroll
    for (int token = 0; token < Tokens; ++token) {
      const uint8_t* const record = records_[token] + round * (kPartials * Record::kBytes);
      int high = 0, low = int(sum_start(0));
#pragma unroll
      for (int word = 0; word < kSums / 4; word += 2) {
        const uint4 sums = *reinterpret_cast<const uint4*>(record + Record::kSumsAt + word * 8);
        high = dot_of_four<true>(Format::minima(block, word), sums.x, high);
        low = dot_of_four<true>(Format::minima(block, word), sums.y, low);
        high = dot_of_four<true>(Format::minima(block, word + 1), sums.z, high);
        low = dot_of_four<true>(Format::minima(block, word + 1), sums.w, low);
      }
      const float value = scale.times((high << kLowSumBits) + low);
      const float x_scale = *reinterpret_cast<const float*>(record + Record::kSumScalesAt);
      partial_[token] = fma(value, x_scale, partial_[token]);
    }
  }

  const uint8_t* records_[Tokens];  // of this warp's first unit
  Table16 table_;                   // in two addends, of formats that have one
  float partial_[Tokens];
};

// Whether a product takes lanes. Then its activations are staged in records of single tokens. Where
// rows are few, several tokens take less time on tensor cores, with 16 rows a thread block.
template <class Format>
bool takes_lanes(const ProductArgs& args, const Device& device) {
  if constexpr (kLaneTokens<Format> == 0) {
    return false;
  } else {
    const int64_t staged = staged_bytes<Format>(args.ncols, 1);
    if (!has_copies(args, device) || args.m > kLaneTokens<Format> ||
        (args.m > 1 && has_few_rows(args, device)) || staged > kMostStagedInLanes / args.m) {
      return false;
    }
    return with_lane_tokens<kLaneTokens<Format>>(args.m, [&](auto tokens) {
      using Tile = LaneTile<Format, decltype(tokens)::value>;
      return with_lane_ring<Format>(args, [&](auto* ring) {
        return int(holds<Tile>(ring, 1, Tile::activation_bytes(args.ncols), device));
      });
    });
  }
}

// How a product in lanes is divided, after a staging kernel of its own.
template <class Format>
int lane_geometry(const ProductArgs& args, const Device& device, Geometry& geometry) {
  if constexpr (kLaneTokens<Format> == 0) {
    return BCY_ERROR_INVALID_ARGUMENT;
  } else {
    return with_lane_tokens<kLaneTokens<Format>>(args.m, [&](auto tokens) {
      using Tile = LaneTile<Format, decltype(tokens)::value>;
      return with_lane_ring<Format>(args, [&](auto* ring) {
        using Ring = std::remove_pointer_t<decltype(ring)>;
        return geometry_of<Tile, Ring>(args, device, int(Tile::activation_bytes(args.ncols)), false,
                                       geometry);
      });
    });
  }
}

}  // namespace bcy
