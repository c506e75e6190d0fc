// SPDX-License-Identifier: Apache-2.0
// AVX-512 for rows.h.
#pragma once

#include "cpu/vectors_avx512.h"

namespace bcy::cpu::nf4 {
namespace {

struct Avx512 : Avx512Floats {
  using Table = Floats;
  static BCY_INLINE Table load_table(const float* values) { return load(F32{}, values); }
  static BCY_INLINE Table scale(Table table, Floats factor) { return table * factor; }
  template <int kShift>
  static BCY_INLINE Floats look_up(Table table, Words codes) {
    return (Floats)_mm512_permutexvar_ps(bits(codes >> kShift), (__m512)table);
  }
  static BCY_INLINE Words widen(const uint8_t* p) {
    return (Words)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  // Bytes of 2 * kWidth codes, so that those of even elements (the high nibbles) and of odd ones
  // join to two vectors in order.
  static BCY_INLINE Words widen_to_join(const uint8_t* p) {
    constexpr char no = -1;
    const __m128i first = _mm_setr_epi8(0, no, no, no, 1, no, no, no, 8, no, no, no, 9, no, no, no);
    const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
    const __m512i places = _mm512_or_si512(_mm512_broadcast_i32x4(first), lanes);
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return (Words)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes), places);
  }
  static BCY_INLINE Words load_words(const uint8_t* p) { return (Words)_mm512_loadu_si512(p); }
  static BCY_INLINE void eights(Floats v, __m256* out) {
    out[0] = _mm512_castps512_ps256((__m512)v);
    out[1] = _mm512_extractf32x8_ps((__m512)v, 1);
  }
  static BCY_INLINE void join(Floats even, Floats odd, Floats* out) {
    out[0] = (Floats)_mm512_unpacklo_ps((__m512)even, (__m512)odd);
    out[1] = (Floats)_mm512_unpackhi_ps((__m512)even, (__m512)odd);
  }
};

}  // namespace
}  // namespace bcy::cpu::nf4
