// SPDX-License-Identifier: Apache-2.0
// How the CPU backend lays out activations as integers, and what its kernels share.
//
// The eight partial sums are the lanes of a vector: a step takes group g of eight units p = 0 .. 7,
// a span is eight units, thus eight steps. One record holds what a token has for a step:
//
//   int8   u[8][8][4]      dword k of the group, lane p, byte: a dot product of four in every lane
//   float  scale[8]        d_a
//   int32  correction[8]   -kOffset * sum of u, where codes are made unsigned by adding kOffset.
//                          Two of them, one for each half of the group, where scales are for 16
//                          elements
//   float  sum[8]          s_a instead, where the format has float minima
//
// and after those of a span, where minima are integers:
//
//   int8   sum[n / 4][2][8][4]   high, low part of the integers of a unit's n sums, by lane
//   float  scale[8]              of theirs
//
// Fine ones have 24-bit integers, 4096 high + low, instead:
//
//   int16  x[8][4][8][2]   dword k of the group; low 0 and 2, low 1 and 3, high 0 and 2, high 1 and
//                          3 of its four; lane p
//   float  scale[8]
//   int32  correction[2][8]   of low, of high; or float sum[8], of any minima. Either for each half
//                             as above
//
// With fewer units than lanes the lanes repeat (1, 2 or 4 of them), so that a vector serves several
// weight rows. Lanes of units that do not exist are zeros, and no sum takes them.
//
// Included by sources for several instruction sets: all is forced inline, as numeric.h explains.
#pragma once

#include <stdint.h>

#include <type_traits>

#include "baracuda/api.h"
#include "baracuda/formats.h"
#include "baracuda/order.cuh"
#include "cpu/elements.h"

namespace bcy::cpu {

constexpr int kLanes = kPartials;
constexpr int64_t kSpan = kUnit * kLanes;
constexpr int kTokenTile = 8;  // tokens that share an unpacked weight

// What is added to a code, without the format's factor 2^shift, to make it unsigned.
template <class Format>
constexpr int kOffset = 0;
template <>
inline constexpr int kOffset<Q4_0> = 8;
template <>
inline constexpr int kOffset<Q5_0> = 16;
template <>
inline constexpr int kOffset<Q8_0> = 128;
template <>
inline constexpr int kOffset<Q8_K> = 128;
template <>
inline constexpr int kOffset<Q3_K> = 4;
template <>
inline constexpr int kOffset<Q6_K> = 32;
template <>
inline constexpr int kOffset<IQ4_NL> = 128;
template <>
inline constexpr int kOffset<IQ4_XS> = 128;
template <>
inline constexpr int kOffset<MXFP4> = 12;

template <class Format, bool kFine = false>
struct Layout {
  static constexpr int kUnitBytes = Format::kBytes * (kUnit / Format::kElements);
  static constexpr int kHalves = kGroup / Format::kScaleElements;
  static constexpr int kIntegerSums = kFine ? 0 : kUnitMinima<Format>;
  static constexpr int kSums =
      kIntegerSums > 0 ? 0 : (kFine && Format::kMinima == 0 ? 2 : 1) * kHalves;
  static constexpr int kWord = (kFine ? 4 : 1) * 4 * kLanes;  // bytes of a record for four elements
  static constexpr int kScale = kGroup / 4 * kWord;  // offsets in a record
  static constexpr int kSum = kScale + 4 * kLanes;
  static constexpr int kRecord = kSum + 4 * kLanes * kSums;
  static constexpr int kUnitSums = kUnitGroups * kRecord;  // offsets in those of a span
  static constexpr int kUnitScale = kUnitSums + 2 * kLanes * kIntegerSums;
  static constexpr int kSpanRecords = kIntegerSums > 0 ? kUnitScale + 4 * kLanes : kUnitSums;

  // Codes of a block of 32 end the block, so they may start in the middle of a dword. They are kept
  // as they lie: byte 0 of the first dword is then not the first code, and u is rotated alike.
  static constexpr int kCodeBytes = std::is_same_v<Format, Q8_0> ? 32 : 16;
  static BCY_INLINE constexpr int rotation(int group) {
    return Format::kElements == kGroup ? (group + 1) * Format::kBytes % 4 : 0;
  }
  // Where element e of a group is among its 32.
  static BCY_INLINE constexpr int place(int group, int e) {
    return (e & ~(kCodeBytes - 1)) | ((e + rotation(group)) & (kCodeBytes - 1));
  }
};

// How K divides.
struct Spans {
  int64_t units;
  int64_t spans;
  int lanes;  // different ones per weight row

  BCY_INLINE explicit Spans(int64_t ncols)
      : units(unit_count(ncols)),
        spans((units + kLanes - 1) / kLanes),
        lanes(units > 4    ? 8
              : units == 3 ? 4
                           : int(units > 0 ? units : 1)) {}
};

template <class L>
BCY_INLINE int64_t token_bytes(int64_t ncols) {
  return Spans(ncols).spans * L::kSpanRecords;
}

// Four 24-bit integers, dword k of a lane, to a fine record and back.
constexpr int kLowBits = 12;
BCY_INLINE void put_fine(const int32_t* x, uint8_t* record, int k, int lane) {
  for (int odd = 0; odd < 2; ++odd) {
    const int32_t a = x[odd], b = x[odd + 2];
    constexpr int32_t kLow = (1 << kLowBits) - 1;
    const uint32_t low = uint32_t(a & kLow) | uint32_t(b & kLow) << 16;
    const uint32_t high = (uint32_t(a >> kLowBits) & 0xffffu) | uint32_t(b >> kLowBits) << 16;
    memcpy(record + ((4 * k + odd) * kLanes + lane) * 4, &low, 4);
    memcpy(record + ((4 * k + 2 + odd) * kLanes + lane) * 4, &high, 4);
  }
}
BCY_INLINE int32_t fine_at(const uint8_t* record, int k, int lane, int i) {
  int16_t low, high;
  memcpy(&low, record + ((4 * k + i % 2) * kLanes + lane) * 4 + i / 2 * 2, 2);
  memcpy(&high, record + ((4 * k + 2 + i % 2) * kLanes + lane) * 4 + i / 2 * 2, 2);
  return high * (1 << kLowBits) + low;
}

// The sums of a unit, as integers with their scale, to the records of its span.
template <class L, int kCount>
BCY_INLINE void put_unit_sums(const float (&sums)[kCount], uint8_t* span, int lane) {
  uint32_t largest = 0;
  for (const float sum : sums) {
    const uint32_t magnitude = as_bits(sum) & 0x7fffffffu;  // ordered as they are, NaN last
    if (magnitude > largest) largest = magnitude;
  }
  const GroupScale unit = binary_scale<kSumBits>(as_float(largest), largest < 0x7f800000u);
  for (int i = 0; i < kCount; ++i) {
    const int sum = sum_to_integer(sums[i], unit);
    uint8_t* const word = span + L::kUnitSums + (i / 4 * 2 * kLanes + lane) * 4 + i % 4;
    word[0] = uint8_t(high_of_sum(sum));
    word[4 * kLanes] = uint8_t(low_of_sum(sum));
  }
  memcpy(span + L::kUnitScale + 4 * lane, &unit.scale, 4);
}

template <class Format>
BCY_INLINE int64_t row_bytes(int64_t ncols) {
  return ncols / Format::kElements * Format::kBytes;
}

// What one instruction set has for one format: each does the rows (stage: tokens) [begin, end). The
// workspace of matmul holds what stage makes, that of matvec what stage_fine does.
struct Kernels {
  void (*stage)(const bcy_gguf_matmul_args& args, int64_t begin, int64_t end);
  void (*matmul)(const bcy_gguf_matmul_args& args, int64_t begin, int64_t end);
  void (*stage_fine)(const bcy_gguf_matmul_args& args, int64_t begin, int64_t end);
  void (*matvec)(const bcy_gguf_matmul_args& args, int64_t begin, int64_t end);
  void (*dequantize)(const bcy_gguf_dequantize_args& args, int64_t begin, int64_t end);
};

// By GGUF type id; nullptr for an unknown one.
const Kernels* baseline_kernels(int32_t format);
const Kernels* avx2_kernels(int32_t format);
const Kernels* avx512_kernels(int32_t format);

}  // namespace bcy::cpu
