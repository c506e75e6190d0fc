// SPDX-License-Identifier: Apache-2.0
// How staged activations lie: a record of what a warp takes with one unit of weights, for each unit
// of each eight tokens; records of single tokens, one token's after the other's, for M = 1 and
// where the product takes lanes.
//
//   codes   [4 pairs of groups][token][4 lanes][2 groups][2 halves][4]: of the four lanes that hold
//           a token, lane t has words t and t + 4 of both groups in 16 bytes
//   scales  [4 pairs of groups][pair of tokens][2 groups][2 tokens], or [4][2 groups] for a single
//           token: d_a
//   sums    of formats with float minima, as scales: d_a * (sum of u)
//   sums    of formats with integer minima [token][4 words][high, low][4]: the sums as integers,
//           eight of them followed by zeros; then, as scales of one pair, what scales them
//
// or with one unit of weights for each 16 or 32 tokens that a warpgroup takes:
//
//   codes   [8 groups][2 halves][token][16]
//   sums    of formats with integer minima [high, low][token][16]: as above, a group of codes
//   scales  [8 groups][4 lanes][eight tokens][2], of tokens 2 t and 2 t + 1 of each eight
//   sums    of formats with float minima, as scales; or what scales integers, as those of one group
//
// K is filled up to whole units with zeros, and so are tokens where M is above eight.
#pragma once

#include "baracuda/order.cuh"
#include "cuda/common/activations.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/ring.cuh"

namespace bcy {

constexpr int kTileTokens = 8;
constexpr int kUnitPairs = kUnitGroups / 2;

BCY_INLINE constexpr int64_t token_tiles(int64_t m) { return (m + kTileTokens - 1) / kTileTokens; }

// What a record has of sums: 0; 1, floats of groups; 8 or 16, integers, as many as a unit has
// minima. The latter have place for 16.
template <class Format>
constexpr int kStagedSums = kUnitMinima<Format> > 0 ? kUnitMinima<Format> : Format::kMinima;

// Tokens: 1 or kTileTokens.
template <int Tokens, int Sums>
struct StagedRecord {
  static constexpr int kTokens = Tokens, kSums = Sums;
  static constexpr int kCodes = Tokens * 64;  // of a pair of groups
  static constexpr int kScales = Tokens == 1 ? 8 : Tokens / 2 * 16;
  static constexpr int kScalesAt = kUnitPairs * kCodes;
  static constexpr int kSumsAt = kScalesAt + kUnitPairs * kScales;
  static constexpr int kSumScalesAt = kSumsAt + Tokens * 32;  // of integers
  static constexpr int kEnd = Sums == 0   ? kSumsAt
                              : Sums == 1 ? kSumsAt + kUnitPairs * kScales
                                          : kSumScalesAt + kScales;
  static constexpr int kBytes = (kEnd + 15) / 16 * 16;

  static __device__ __forceinline__ void put_codes(uint8_t* record, int token, int group, int t,
                                                   uint2 halves) {
    *reinterpret_cast<uint2*>(record + group / 2 * kCodes + token * 64 + t * 16 + group % 2 * 8) =
        halves;
  }
  static BCY_INLINE int scale_at(int token, int group) {
    return kScalesAt + group / 2 * kScales + in_pair(token, group);
  }
  // Of floats.
  static BCY_INLINE int sum_at(int token, int group) {
    return kSumsAt + group / 2 * kScales + in_pair(token, group);
  }
  // Of integer i: byte 0 is its high one, byte 1 its low one.
  static BCY_INLINE uint8_t* sum_byte(uint8_t* record, int token, int i, int byte) {
    return record + kSumsAt + token * 32 + i / 4 * 8 + byte * 4 + i % 4;
  }
  static BCY_INLINE int sum_scale_at(int token) { return kSumScalesAt + in_pair(token, 0); }

 private:
  static BCY_INLINE int in_pair(int token, int group) {
    return Tokens == 1 ? 4 * (group % 2) : token / 2 * 16 + 8 * (group % 2) + 4 * (token % 2);
  }
};

// Tokens: 16 or 32.
template <int Tokens, int Sums>
struct WarpgroupRecord {
  static constexpr int kTokens = Tokens, kSums = Sums;
  static constexpr int kCodes = Tokens * kGroup;  // of a group
  static constexpr int kScales = Tokens * int(sizeof(float));
  static constexpr int kIntegersAt = kUnitGroups * kCodes;
  static constexpr int kScalesAt = kIntegersAt + (Sums > 1 ? kCodes : 0);
  static constexpr int kSumsAt = kScalesAt + kUnitGroups * kScales;  // or what scales integers
  static constexpr int kEnd = kSumsAt + (Sums == 0 ? 0 : Sums == 1 ? kUnitGroups : 1) * kScales;
  static constexpr int kBytes = (kEnd + 127) / 128 * 128;

  static __device__ __forceinline__ void put_codes(uint8_t* record, int token, int group, int t,
                                                   uint2 halves) {
    uint8_t* const here = record + group * kCodes + token * 16 + t * 4;
    *reinterpret_cast<uint32_t*>(here) = halves.x;
    *reinterpret_cast<uint32_t*>(here + Tokens * 16) = halves.y;
  }
  static BCY_INLINE int scale_at(int token, int group) {
    return kScalesAt + group * kScales + in_group(token);
  }
  static BCY_INLINE int sum_at(int token, int group) {
    return kSumsAt + group * kScales + in_group(token);
  }
  static BCY_INLINE uint8_t* sum_byte(uint8_t* record, int token, int i, int byte) {
    return record + kIntegersAt + (byte * Tokens + token) * 16 + i;
  }
  static BCY_INLINE int sum_scale_at(int token) { return kSumsAt + in_group(token); }

 private:
  static BCY_INLINE int in_group(int token) {
    return (token % 8 / 2 * (Tokens / 8) + token / 8) * 8 + token % 2 * 4;
  }
};

template <int Sums>
int64_t record_bytes(int64_t m) {
  return m == 1 ? StagedRecord<1, Sums>::kBytes : StagedRecord<kTileTokens, Sums>::kBytes;
}

// -1 when it exceeds int64.
template <class Format>
int64_t staged_bytes(int64_t ncols, int64_t m) {
  const int64_t record = record_bytes<kStagedSums<Format>>(m);
  if (m > INT64_MAX - kTileTokens || ncols > INT64_MAX - kUnit) return -1;
  if (m > 0 && unit_count(ncols) > INT64_MAX / 2 / record / token_tiles(m)) return -1;
  return token_tiles(m) * unit_count(ncols) * record;
}

// Tokens that a product in lanes takes at a time, at most: as many as there are registers for, or
// as it is the faster way for. Q3_K has the most scales to unpack four times, Q8_K has none.
template <class Format>
constexpr int kLaneTokens = 2;
template <>
inline constexpr int kLaneTokens<Q3_K> = 3;
template <>
inline constexpr int kLaneTokens<Q8_K> = 0;

// Whether a product of one token in lanes takes little longer than its weights take to arrive.
template <class Format>
constexpr bool reads_most = kWholeBits<Format> >= 4 && !gives_turns<Format>;

// Up to so many columns of a single token are staged by the product itself: that every thread block
// does it takes less time than a kernel of its own. Outside lanes twice as many blocks do it, for
// 16 rows each.
template <class Format>
constexpr int64_t kMostFused = kLaneTokens<Format> == 0 ? 4096 : 6144;

// Two tokens take a kernel of their own less time, unless this one runs beside the one before it on
// most multiprocessors, one tile on each.
template <class Format>
bool stages_inside(const ProductArgs& args, const Device& device) {
  if (device.arch < 800 || args.m > 2) return false;
  if (args.m == 1) return args.ncols <= kMostFused<Format>;
  constexpr bool kSmall = kUnitBytes<Format> <= 160;  // or there is no room beside it
  return kSmall && kLaneTokens<Format> > 1 && device.arch >= 900 && args.overlap != 0 &&
         args.ncols <= 4096 && args.nrows <= 32 * int64_t{device.processors} &&
         !has_few_rows(args, device);
}

struct Staged {
  uint8_t* records;  // [tiles of tokens][units]; in lanes a tile is a token
  int64_t units;
  bool vectors;  // four activations from a multiple of four on can be loaded at once
  bool turns;  // of formats that give them: codes of both halves by turns
  bool fused;  // the product stages for itself, into shared memory
};

inline Staged staged_of(const ProductArgs& args, bool turns, bool fused) {
  return {static_cast<uint8_t*>(args.workspace), unit_count(args.ncols), loads_at_once(args, 4),
          turns, fused};
}

// ---- staging, by a warp -----------------------------------------------------------------------------------------

// An element of the group over its scale, to the nearest integer, ties to even: in the low bits,
// where adding 1.5 * 2^23 leaves it. No clip: no magnitude exceeds the largest, which fits.
__device__ __forceinline__ uint32_t rounded(float x, GroupScale scale) {
  return as_bits(add(mul(x, scale.inverse), 12582912.0f));
}

// Four codes, those of a group without an inverse 0.
__device__ __forceinline__ uint32_t pack_codes(const float* x, GroupScale scale) {
  uint32_t bits[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) bits[i] = rounded(x[i], scale);
  const uint32_t low = __byte_perm(bits[0], bits[1], 0x0040);
  const uint32_t high = __byte_perm(bits[2], bits[3], 0x0040);
  return scale.inverse == 0.0f ? 0 : __byte_perm(low, high, 0x5410);
}

// Of the group that four lanes hold, eight elements each.
template <GroupScale (*scale_of)(float largest_magnitude, bool all_finite)>
__device__ __forceinline__ GroupScale scale_of_four_lanes(const float (&x)[8]) {
  // Magnitudes are ordered as their bits are, infinities and NaN last.
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) largest = max(largest, as_bits(x[i]) & 0x7fffffffu);
  largest = max(largest, __shfl_xor_sync(~0u, largest, 1));
  largest = max(largest, __shfl_xor_sync(~0u, largest, 2));
  return scale_of(as_float(largest), largest < 0x7f800000u);
}

// Of the sums of a unit, whose groups each four lanes hold.
template <int Count>
__device__ __forceinline__ GroupScale scale_of_groups(const float (&sums)[Count]) {
  uint32_t largest = 0;
#pragma unroll
  for (const float sum : sums) largest = max(largest, as_bits(sum) & 0x7fffffffu);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  largest = __reduce_max_sync(~0u, largest);
#else
#pragma unroll
  for (int lanes = 4; lanes < 32; lanes *= 2) {
    largest = max(largest, __shfl_xor_sync(~0u, largest, lanes));
  }
#endif
  return binary_scale<kSumBits>(as_float(largest), largest < 0x7f800000u);
}

// The bytes of both words by turns, as look_up_by_turns gives codes.
__device__ __forceinline__ uint2 in_turns(uint2 words) {
  return {__byte_perm(words.x, words.y, 0x5140), __byte_perm(words.x, words.y, 0x7362)};
}

__device__ __forceinline__ int sum_of_four_lanes(int value) {
  value += __shfl_xor_sync(~0u, value, 1);
  return value + __shfl_xor_sync(~0u, value, 2);
}

__device__ __forceinline__ int sum_of_codes(uint32_t codes) {
  return __dp4a(int(codes), 0x01010101, 0);
}

// One unit of one token: lane 4 g + t has words t and t + 4 of group g in x.
template <class Record>
__device__ __forceinline__ void stage_unit(const ProductArgs& args, const Staged& staged,
                                           const float (&x)[8], uint8_t* records, int64_t token,
                                           int64_t unit) {
  constexpr int kTokens = Record::kTokens, kSums = Record::kSums;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const GroupScale scale = scale_of_four_lanes<group_scale>(x);
  const uint2 words = {pack_codes(x, scale), pack_codes(x + 4, scale)};

  uint8_t* const record = records + (token / kTokens * staged.units + unit) * Record::kBytes;
  const int in_tile = int(token % kTokens);
  Record::put_codes(record, in_tile, g, t, staged.turns ? in_turns(words) : words);
  // The last of an odd number of tokens below eight has no partner: its place holds a zero.
  const bool alone =
      kTokens == kTileTokens && args.m < kTokens && token + 1 == args.m && in_tile % 2 == 0;
  const auto put = [&](int at, float value) {
    float* const place = reinterpret_cast<float*>(record + at);
    if (t == 0) place[0] = value;
    if (t == 1 && alone) place[1] = 0.0f;
  };
  put(Record::scale_at(in_tile, g), scale.scale);
  if constexpr (kSums == 0) return;
  constexpr int kOfGroup = kSums == 16 ? 2 : 1;
  int codes[2] = {sum_of_codes(words.x), sum_of_codes(words.y)};
  if constexpr (kOfGroup == 1) codes[0] += codes[1];
  float sums[kOfGroup];
#pragma unroll
  for (int i = 0; i < kOfGroup; ++i) sums[i] = staged_sum(scale, sum_of_four_lanes(codes[i]));
  if constexpr (kSums == 1) {
    put(Record::sum_at(in_tile, g), sums[0]);
  } else {
    const GroupScale unit_scale = scale_of_groups(sums);
    if (g == 0) put(Record::sum_scale_at(in_tile), unit_scale.scale);
    // Each lane puts one byte of the group's first integer or of the other, which is 0 of eight.
    const int i = t / 2, byte = t % 2;
    const int place = kSums == 16 ? 2 * g + i : kSums * i + g;
    const float sum = i == 0 ? sums[0] : kSums == 16 ? sums[1] : 0.0f;
    // As sum_to_integer gives it, but where the scale is NaN.
    const uint32_t integer = rounded(sum, unit_scale);
    *Record::sum_byte(record, in_tile, place, byte) =
        uint8_t(byte == 0 ? integer >> kLowSumBits : integer & ((1u << kLowSumBits) - 1));
  }
}

// What a lane has of one unit of one token; zeros past the ends.
template <class X>
__device__ __forceinline__ void load_unit(const ProductArgs& args, bool vectors, int64_t token,
                                          int64_t unit, float (&x)[8]) {
  const int lane = threadIdx.x % 32;
  const int64_t k = unit * kUnit + lane / 4 * kGroup;
  if (token < args.m && k < args.ncols) {
    const auto* const from =
        static_cast<const typename X::Storage*>(args.x) + token * args.x_stride + k + lane % 4 * 4;
    load_four<X>(from, vectors, x);
    load_four<X>(from + 16, vectors, x + 4);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = 0.0f;
  }
}

// Calls put(x, token, unit) for each of Each units from number `first` of `count` on; place(i,
// token, unit) says which they are. All loads come first, so that they wait together.
template <int Each, class Place, class Put>
__device__ __forceinline__ void with_units(const ProductArgs& args, bool vectors, int64_t first,
                                           int64_t count, Place place, Put put) {
  float x[Each][8];
  const auto load = [&](auto element) {
#pragma unroll
    for (int i = 0; i < Each; ++i) {
      int64_t token = args.m, unit = 0;
      if (first + i < count) place(first + i, token, unit);
      load_unit<decltype(element)>(args, vectors, token, unit, x[i]);
    }
  };
  if (args.x_type == BCY_F32) {
    load(F32{});
  } else if (args.x_type == BCY_F16) {
    load(F16{});
  } else {
    load(BF16{});
  }
#pragma unroll
  for (int i = 0; i < Each; ++i) {
    if (first + i >= count) return;
    int64_t token, unit;
    place(first + i, token, unit);
    put(x[i], token, unit);
  }
}

// The same of the units that a warp of a product takes, and alone reads what is put. tokens: best a
// constant, which divides without division.
template <int AtOnce = 4, class Put>
__device__ __forceinline__ void with_own_units(const ProductArgs& args, bool vectors, int units,
                                               int tokens, Put put) {
  const int warp = threadIdx.x / 32;
  const int count = (units - warp + kPartials - 1) / kPartials * tokens;
  for (int first = 0; first < count; first += AtOnce) {
    with_units<AtOnce>(
        args, vectors, first, count,
        [&](int64_t i, int64_t& token, int64_t& unit) {
          token = int(i) % tokens;
          unit = int(i) / tokens * kPartials + warp;
        },
        put);
  }
  __syncwarp();
}

// Those, staged into shared memory.
template <int Tokens, int Sums>
__device__ __forceinline__ void stage_own_units(const ProductArgs& args, const Staged& staged,
                                                uint8_t* memory, int tokens) {
  with_own_units(args, staged.vectors, int(staged.units), tokens,
                 [&](const float (&x)[8], int64_t token, int64_t unit) {
                   stage_unit<StagedRecord<Tokens, Sums>>(args, staged, x, memory, token, unit);
                 });
}

}  // namespace bcy
