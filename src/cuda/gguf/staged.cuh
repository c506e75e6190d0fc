// SPDX-License-Identifier: Apache-2.0
// How staged activations lie: a record of what a warp takes with one unit of weights, for each unit
// of each eight tokens; for M = 1 records of a single token.
//
//   codes   [4 pairs of groups][token][4 lanes][2 groups][2 halves][4]: of the four lanes that hold
//   a
//           token, lane t has words t and t + 4 of both groups in 16 bytes
//   scales  [4 pairs of groups][pair of tokens][2 groups][2 tokens], or [4][2 groups] for a single
//           token: d_a
//   sums    [4 pairs of groups][minima], then as scales: d_a * (sum of u over what the minimum
//   covers)
//
// K is filled up to whole units with zeros, and so are tokens where M is above eight.
#pragma once

#include "activations.cuh"
#include "baracuda/order.cuh"

namespace bcy {

constexpr int kTileTokens = 8;
constexpr int kUnitPairs = kUnitGroups / 2;

BCY_INLINE constexpr int64_t unit_count(int64_t ncols) { return (ncols + kUnit - 1) / kUnit; }
BCY_INLINE constexpr int64_t token_tiles(int64_t m) { return (m + kTileTokens - 1) / kTileTokens; }

// Tokens: 1 or kTileTokens.
template <int Tokens, int Minima>
struct StagedRecord {
  static constexpr int kLaneBytes = Tokens == 1 ? 8 : 16;  // of the scales of two groups
  static constexpr int kCodes = Tokens * 64;  // of a pair of groups
  static constexpr int kScales = Tokens == 1 ? 8 : Tokens / 2 * 16;
  static constexpr int kScalesAt = kUnitPairs * kCodes;
  static constexpr int kSumsAt = kScalesAt + kUnitPairs * kScales;
  static constexpr int kBytes = kSumsAt + kUnitPairs * Minima * kScales;
};

inline int64_t record_bytes(int64_t m, int minima) {
  constexpr int kSingle[] = {StagedRecord<1, 0>::kBytes, StagedRecord<1, 1>::kBytes,
                             StagedRecord<1, 2>::kBytes};
  constexpr int kTile[] = {StagedRecord<kTileTokens, 0>::kBytes,
                           StagedRecord<kTileTokens, 1>::kBytes,
                           StagedRecord<kTileTokens, 2>::kBytes};
  return m == 1 ? kSingle[minima] : kTile[minima];
}

// -1 when it exceeds int64.
inline int64_t staged_bytes(int64_t ncols, int64_t m, int minima) {
  const int64_t record = record_bytes(m, minima);
  if (m > INT64_MAX - kTileTokens || ncols > INT64_MAX - kUnit) return -1;
  if (m > 0 && unit_count(ncols) > INT64_MAX / 2 / record / token_tiles(m)) return -1;
  return token_tiles(m) * unit_count(ncols) * record;
}

// Up to kFusedElements a product stages for itself: each thread block stages all that it needs,
// which takes less time than a kernel of its own.
constexpr int64_t kFusedElements = 16384;
inline bool stages_inside(int compute_capability_major, int64_t ncols, int64_t m) {
  return compute_capability_major >= 8 && m <= kTileTokens && ncols <= kFusedElements &&
         m * ncols <= kFusedElements;
}

struct Staged {
  uint8_t* records;  // [tiles of tokens][units]
  int64_t units;
  bool vectors;  // four activations from a multiple of four on can be loaded at once
  bool fused;  // the product stages for itself, into shared memory
};

inline Staged staged_of(const bcy_gguf_matmul_args& args, bool fused) {
  return {static_cast<uint8_t*>(args.workspace), unit_count(args.ncols), loads_four_at_once(args),
          fused};
}

// ---- staging, by a warp: one unit of one token --------------------------------------------------------------------

__device__ __forceinline__ uint32_t pack_codes(const float* x, GroupScale scale, int& sum) {
  uint32_t word = 0;
  sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int u = stage_element(x[i], scale);
    word |= (uint32_t(u) & 0xffu) << 8 * i;
    sum += u;
  }
  return word;
}

__device__ __forceinline__ int sum_of_four_lanes(int value) {
  value += __shfl_xor_sync(~0u, value, 1);
  return value + __shfl_xor_sync(~0u, value, 2);
}

// Lane 4 g + t has words t and t + 4 of group g. Tokens past the end are zeros.
template <int Tokens, int Minima>
__device__ __forceinline__ void stage_unit(const bcy_gguf_matmul_args& args, const Staged& staged,
                                           uint8_t* records, int64_t token, int64_t unit) {
  using Record = StagedRecord<Tokens, Minima>;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t k = unit * kUnit + g * kGroup;
  float x[8] = {};
  if (token < args.m && k < args.ncols) {
    const int64_t from = token * args.x_stride + k + 4 * t;
    load_four(args.x, from, args.x_type, staged.vectors, x);
    load_four(args.x, from + 16, args.x_type, staged.vectors, x + 4);
  }
  // Magnitudes are ordered as their bits are, infinities and NaN last.
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) largest = max(largest, as_bits(x[i]) & 0x7fffffffu);
  largest = max(largest, __shfl_xor_sync(~0u, largest, 1));
  largest = max(largest, __shfl_xor_sync(~0u, largest, 2));
  const GroupScale scale = group_scale(as_float(largest), largest < 0x7f800000u);

  int sums[2];
  uint2 words;
  words.x = pack_codes(x, scale, sums[0]);
  words.y = pack_codes(x + 4, scale, sums[1]);
  uint8_t* const record = records + (token / Tokens * staged.units + unit) * Record::kBytes;
  const int in_tile = int(token % Tokens), pair = g / 2, in_pair = g % 2;
  *reinterpret_cast<uint2*>(record + pair * Record::kCodes + in_tile * 64 + t * 16 + in_pair * 8) =
      words;
  // The last of an odd number of tokens below eight has no partner: its place holds a zero.
  const bool alone = Tokens > 1 && args.m < Tokens && token + 1 == args.m && in_tile % 2 == 0;
  const auto put = [&](int plane, float value) {
    float* const two = reinterpret_cast<float*>(
        record + plane + (Tokens == 1 ? 4 * in_pair : in_tile / 2 * 16 + 8 * in_pair));
    if (t == 0) two[in_tile % 2] = value;
    if (t == 1 && alone) two[1] = 0.0f;
  };
  put(Record::kScalesAt + pair * Record::kScales, scale.scale);
  if constexpr (Minima == 1) {
    put(Record::kSumsAt + pair * Record::kScales,
        staged_sum(scale, sum_of_four_lanes(sums[0] + sums[1])));
  } else if constexpr (Minima == 2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      put(Record::kSumsAt + (pair * 2 + half) * Record::kScales,
          staged_sum(scale, sum_of_four_lanes(sums[half])));
    }
  }
}

}  // namespace bcy
