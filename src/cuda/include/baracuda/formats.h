// SPDX-License-Identifier: Apache-2.0
// All GGUF block formats. Each is a struct without state that reads one packed block:
//
//   kId, kElements, kBytes, kAlignment   GGUF type id; elements and bytes of a block; alignment of
//   a block in bytes kScaleElements   32, or 16 when each half of a group has an integer scale of
//   its own kMinima          minima of a group: 0, 1, or 2 (one per half) kUnsignedCodes   codes
//   are uint8 rather than int8
//
//   codes(block, group, word)      four codes: elements 32 group + 4 word .. + 3 of the block,
//   first in the low byte shift(group)                   codes carry a factor 2^shift, where that
//   saves instructions; scale() takes it out scale(block, group)            weight of a unit code,
//   exact in float32 (without the half's integer scale) half_scale(block, group, half) integer
//   scale of a half            (kScaleElements == 16) minimum(block, group, half)    what is added
//   to every value, exact (kMinima > 0; half is 0 for one per group)
//
//   value = scale * half_scale * code + minimum
#pragma once

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

// Code i of a word as an integer.
template <class Format>
BCY_INLINE int code_at(uint32_t word, int i) {
  const uint32_t byte = word >> 8 * i & 0xffu;
  return Format::kUnsignedCodes ? int(byte) : int(int8_t(byte));
}

// The four values of a word, each rounded to float32 once: as ggml gives them, the sign of zero
// included.
template <class Format>
BCY_INLINE void dequantize_word(const uint8_t* block, int group, int word, float out[4]) {
  const uint32_t codes = Format::codes(block, group, word);
  float scale = Format::scale(block, group);
  if constexpr (Format::kScaleElements == 16) {
    scale = mul(scale, float(Format::half_scale(block, group, word / 4)));
  }
  if constexpr (Format::kMinima == 0) {
    for (int i = 0; i < 4; ++i) out[i] = mul(scale, float(code_at<Format>(codes, i)));
  } else {
    const float minimum = Format::minimum(block, group, Format::kMinima == 2 ? word / 4 : 0);
    for (int i = 0; i < 4; ++i) out[i] = fma(scale, float(code_at<Format>(codes, i)), minimum);
  }
}

}  // namespace bcy
