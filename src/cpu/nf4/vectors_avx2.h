// SPDX-License-Identifier: Apache-2.0
// AVX2 for rows.h.
#pragma once

#include "cpu/vectors_avx2.h"

namespace bcy::cpu::nf4 {
namespace {

struct Avx2 : Avx2Floats {
  struct Table {
    Floats low, high;  // eight entries each
  };
  static BCY_INLINE Table load_table(const float* values) {
    return {load(F32{}, values), load(F32{}, values + 8)};
  }
  static BCY_INLINE Table scale(const Table& table, Floats factor) {
    return {table.low * factor, table.high * factor};
  }
  template <int kShift>
  static BCY_INLINE Floats look_up(const Table& table, Words codes) {
    const __m256i places = bits(codes >> kShift);
    const __m256 low = _mm256_permutevar8x32_ps((__m256)table.low, places);
    const __m256 high = _mm256_permutevar8x32_ps((__m256)table.high, places);
    return (Floats)_mm256_blendv_ps(low, high, (__m256)(codes << (28 - kShift)));
  }
  static BCY_INLINE Words widen(const uint8_t* p) {
    return (Words)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  // Bytes of 2 * kWidth codes, so that those of even elements (the high nibbles) and of odd ones
  // join to two vectors in order.
  static BCY_INLINE Words widen_to_join(const uint8_t* p) {
    constexpr char no = -1;
    const __m256i places =
        _mm256_setr_epi8(0, no, no, no, 1, no, no, no, 4, no, no, no, 5, no, no, no,  //
                         2, no, no, no, 3, no, no, no, 6, no, no, no, 7, no, no, no);
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return (Words)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), places);
  }
  static BCY_INLINE Words load_words(const uint8_t* p) {
    return (Words)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static BCY_INLINE void eights(Floats v, __m256* out) { out[0] = (__m256)v; }
  static BCY_INLINE void join(Floats even, Floats odd, Floats* out) {
    out[0] = (Floats)_mm256_unpacklo_ps((__m256)even, (__m256)odd);
    out[1] = (Floats)_mm256_unpackhi_ps((__m256)even, (__m256)odd);
  }
};

}  // namespace
}  // namespace bcy::cpu::nf4
