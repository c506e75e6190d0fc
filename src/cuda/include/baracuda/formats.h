// SPDX-License-Identifier: Apache-2.0
// All GGUF block formats. Each is a struct without state that reads one packed block, given as
// Bytes (bytes.h):
//
//   kId, kElements, kBytes, kAlignment   GGUF type id; elements, bytes, alignment of a block
//   kScaleElements   32, or 16 when each half of a group has an integer scale of its own
//   kMinima          minima of a group: 0, 1, or 2 (one for each half)
//   kUnsignedCodes   codes are uint8 rather than int8
//
//   codes(block, group, half, word)   four codes: elements 32 group + 16 half + 4 word .. + 3 of
//                                     the block, the first in the low byte; codes<false> of Q4_0
//                                     and Q5_0 leaves the sign bit unflipped
//   shift(group)                      codes carry a factor 2^shift, where that saves instructions
//   unsigned_codes(block, group, half, word, shift)
//                                     where scales_fit_codes: codes before an offset is taken off,
//                                     uint8 with a factor 2^shift; shift is 0 or 2
//   scale(block, group)               weight of a unit code, exact in float32 (without the half's)
//   half_scales(block, group)         integer scales of the halves, plus kHalfOffset, in bytes 2 i
//                                     and 2 i + 1 of a word, i = group % 2 (kScaleElements == 16)
//   minimum(block, group, half)       what is added to every value, exact (kMinima > 0; half is 0
//                                     for one per group)
//
//   value = scale * half scale * (code / 2^shift) + minimum
#pragma once

#include "baracuda/bytes.h"
#include "baracuda/formats/iq4_nl.cuh"
#include "baracuda/formats/iq4_xs.cuh"
#include "baracuda/formats/mxfp4.cuh"
#include "baracuda/formats/q2_k.cuh"
#include "baracuda/formats/q3_k.cuh"
#include "baracuda/formats/q4_0.cuh"
#include "baracuda/formats/q4_1.cuh"
#include "baracuda/formats/q4_k.cuh"
#include "baracuda/formats/q5_0.cuh"
#include "baracuda/formats/q5_1.cuh"
#include "baracuda/formats/q5_k.cuh"
#include "baracuda/formats/q6_k.cuh"
#include "baracuda/formats/q8_0.cuh"
#include "baracuda/formats/q8_k.cuh"

namespace bcy {

// Whether codes are entries of a table of sixteen, Format::table(), that nibbles(block, group,
// word) choose: in the low nibbles elements e .. e + 3 of the group, e = 4 word, in the high ones
// those plus 16. It takes fewer instructions to look up both by turns, elements e, e + 16, e + 1, e
// + 17 and the next four, than to sort them.
template <class Format>
constexpr bool gives_turns = false;
template <>
inline constexpr bool gives_turns<IQ4_NL> = true;
template <>
inline constexpr bool gives_turns<IQ4_XS> = true;
template <>
inline constexpr bool gives_turns<MXFP4> = true;

// Integer minima of a unit, of formats whose minima are integers times minimum_scale(block); 0
// else. Four are the bytes of minima(block, word), in order of k.
template <class Format>
constexpr int kUnitMinima = 0;
template <>
inline constexpr int kUnitMinima<Q2_K> = 16;
template <>
inline constexpr int kUnitMinima<Q4_K> = 8;
template <>
inline constexpr int kUnitMinima<Q5_K> = 8;

// Bits that a weight takes, scales included, rounded down.
template <class Format>
constexpr int kWholeBits = 8 * Format::kBytes / Format::kElements;

// Whether a code times its half's scale still fits a byte, of unsigned codes four times that, for
// Q3_K the negative of it.
template <class Format>
constexpr bool scales_fit_codes = false;
template <>
inline constexpr bool scales_fit_codes<Q2_K> = true;  // 4 * 3 * 15
template <>
inline constexpr bool scales_fit_codes<Q3_K> = true;  // -4 * 32 to 4 * 31

template <class Format, class Block>
BCY_INLINE int half_scale(Block block, int group, int half) {
  return byte_of(Format::half_scales(block, group), 2 * (group % 2) + half) - Format::kHalfOffset;
}

// Weight of a unit code of either half, exact in float32; halves have one together where their
// format has one.
template <class Format, class Block>
BCY_INLINE float fine_scale(Block block, int group, int half) {
  const float scale = Format::scale(block, group);
  if constexpr (Format::kScaleElements == 32) {
    return scale;
  } else {
    const uint32_t scales = Format::half_scales(block, group);
    return mul(scale, byte_to_float(scales, 2 * (group % 2) + half, Format::kHalfOffset));
  }
}

// Code i of a word as an integer, its factor 2^shift taken out.
template <class Format>
BCY_INLINE int code_at(uint32_t word, int i, int group) {
  const int byte = byte_of(word, i);
  return (Format::kUnsignedCodes ? byte : int(int8_t(byte))) >> Format::shift(group);
}

// The same as a float, its factor left in.
template <class Format>
BCY_INLINE float shifted_code_at(uint32_t word, int i) {
  if constexpr (Format::kUnsignedCodes) return byte_to_float(word, i);
  return byte_to_float(word ^ 0x80808080u, i, 128);
}

// Makes values of the codes of a group, or of a half of it where halves have scales or minima of
// their own: value = scale * code + minimum. The codes' factor is taken out of the scale: a power
// of two rounds nothing.
struct ValueScale {
  float scale, minimum;

  // Whether no code makes a NaN.
  BCY_INLINE bool gives_numbers() const { return is_finite(scale) && is_finite(minimum); }
};

template <class Format>
constexpr bool halves_differ = Format::kScaleElements == 16 || Format::kMinima == 2;

template <class Format, class Block>
BCY_INLINE ValueScale value_scale(Block block, int group, int half) {
  float scale =
      mul(Format::scale(block, group), as_float(uint32_t(127 - Format::shift(group)) << 23));
  if constexpr (Format::kScaleElements == 16) {
    const int byte = 2 * (group % 2) + half;
    scale = mul(scale, byte_to_float(Format::half_scales(block, group), byte, Format::kHalfOffset));
  }
  if constexpr (Format::kMinima == 0) {
    return {scale, 0.0f};
  } else {
    return {scale, Format::minimum(block, group, Format::kMinima == 2 ? half : 0)};
  }
}

// The four values of a word, each rounded to float32 once: as ggml gives them, the sign of zero
// included.
template <class Format, class Block>
BCY_INLINE void dequantize_word(Block block, int group, int half, int word, ValueScale of,
                                float out[4]) {
  const uint32_t codes = Format::codes(block, group, half, word);
  for (int i = 0; i < 4; ++i) {
    const float code = shifted_code_at<Format>(codes, i);
    out[i] = Format::kMinima == 0 ? mul(of.scale, code) : fma(of.scale, code, of.minimum);
  }
}

// Calls function(Format{}) for the format of an id; `unknown` is the answer where there is none.
template <class Result, class Function>
inline Result with_format(int32_t id, Result unknown, Function&& function) {
  switch (id) {
#define BCY_FORMAT(Name, file) \
  case Name::kId:              \
    return function(Name{});
#include "baracuda/formats.def"
#undef BCY_FORMAT
    default:
      return unknown;
  }
}

}  // namespace bcy
