// SPDX-License-Identifier: Apache-2.0
// A unit of a row of weights in the registers of one lane.
#pragma once

#include "cuda/common/ring.cuh"

namespace bcy {

// A unit's bytes in registers, as Bytes: all offsets are constants where they are used.
struct WordBytes {
  const uint32_t* words;
  int at;

  __device__ __forceinline__ WordBytes operator+(int offset) const { return {words, at + offset}; }
  __device__ __forceinline__ uint32_t load32(int offset, int more) const {
    const int start = at + offset + more;
    const uint32_t* const word = words + start / 4;
    if (start % 4 == 0) return word[0];
    return __byte_perm(word[0], word[1], 0x3210 + 0x1111 * (start % 4));
  }
  __device__ __forceinline__ uint32_t load16(int offset) const {
    const int start = at + offset;
    if (start % 4 == 3) return load32(offset, 0) & 0xffffu;
    return words[start / 4] >> 8 * (start % 4) & 0xffffu;
  }
  __device__ __forceinline__ uint32_t load8(int offset) const {
    return words[(at + offset) / 4] >> 8 * ((at + offset) % 4) & 0xffu;
  }
  __device__ __forceinline__ float load_half(int offset) const {
    return half_to_float(uint16_t(load16(offset)));
  }
};

template <class Format>
constexpr int kUnitWords = (kUnitBytes<Format> + 3) / 4;

// A unit of this lane's row into registers, from pieces of 8 bytes, of which words are chosen:
// where all lanes' rows are as far off boundaries, they meet half of the bank conflicts that words
// meet.
template <class Format, class Row>
__device__ __forceinline__ void load_level_words(const Row& row,
                                                 uint32_t (&words)[kUnitWords<Format>]) {
  constexpr int kAlignment = Row::kAlignment;
  constexpr int kWords = kUnitWords<Format>;
  constexpr int kPieces = (kUnitBytes<Format> + 8 - kAlignment + 7) / 8;
  const uint32_t ahead = uint32_t(reinterpret_cast<uintptr_t>(row.base)) & 7;
  const auto* const in_stage = reinterpret_cast<const uint2*>(row.base - ahead);
  uint32_t all[2 * kPieces + 2];
#pragma unroll
  for (int i = 0; i <= kPieces; ++i) {
    const uint2 piece = i < kPieces ? in_stage[i] : uint2{0, 0};
    all[2 * i] = piece.x;
    all[2 * i + 1] = piece.y;
  }
#pragma unroll
  for (int i = 0; i <= kWords; ++i) all[i] = ahead & 4 ? all[i + 1] : all[i];
  const uint32_t select = ahead & 2 ? 0x5432 : 0x3210;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    words[i] = kAlignment == 4 ? all[i] : __byte_perm(all[i], all[i + 1], select);
  }
}

// The same by loads as wide as its alignment in a ring allows.
template <class Format, class Row>
__device__ __forceinline__ void load_unit_words(const Row& row,
                                                uint32_t (&words)[kUnitWords<Format>]) {
  constexpr int kWords = kUnitWords<Format>;
  if constexpr (is_level<Row>) {
    load_level_words<Format>(row, words);
  } else if constexpr (Row::kAlignment == 16) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint4 piece = row.template load<uint4>(4 * i);
      words[i] = piece.x;
      words[i + 1] = piece.y;
      words[i + 2] = piece.z;
      words[i + 3] = piece.w;
    }
  } else if constexpr (Row::kAlignment == 8) {
#pragma unroll
    for (int i = 0; i < kWords; i += 2) {
      const uint2 piece = row.template load<uint2>(4 * i);
      words[i] = piece.x;
      words[i + 1] = piece.y;
    }
  } else if constexpr (Row::kAlignment == 4) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = row.template load<uint32_t>(4 * i);
  } else {
    const uint32_t ahead = uint32_t(reinterpret_cast<uintptr_t>(row.base)) & 3;
    const uint32_t select = 0x3210 + 0x1111 * ahead;
    const auto* const in_stage = reinterpret_cast<const uint32_t*>(row.base - ahead);
    // Of boundaries of two bytes, a unit of an odd number of pairs ends in the last word's first
    // half, wherever it begins.
    constexpr bool kPairs = Row::kAlignment == 2 && kUnitBytes<Format> % 4 == 2;
    uint32_t word = in_stage[0];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint32_t next = kPairs && i + 1 == kWords ? 0 : in_stage[i + 1];
      words[i] = __byte_perm(word, next, select);
      word = next;
    }
  }
}

}  // namespace bcy
