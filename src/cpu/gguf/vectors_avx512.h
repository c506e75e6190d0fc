// SPDX-License-Identifier: Apache-2.0
// AVX-512 with VNNI for products.h: two rows of eight lanes.
#pragma once

#include <immintrin.h>

#include "cpu/gguf/layout.h"
#include "cpu/vectors_avx512.h"

namespace bcy::cpu {
namespace {

struct Avx512 : Avx512Floats {
  typedef int32_t Ints __attribute__((vector_size(64)));
  static constexpr int kRows = 2;
  static constexpr bool kAnyByte = true;

  template <int kStride>
  static BCY_INLINE __m512i sixteen(const uint8_t* const* rows, int offset) {
    const auto load = [](const uint8_t* p) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    };
    __m512i v = _mm512_castsi128_si512(load(rows[0] + offset));
    v = _mm512_inserti32x4(v, load(rows[0] + offset + 4 * kStride), 1);
    v = _mm512_inserti32x4(v, load(rows[1] + offset), 2);
    return _mm512_inserti32x4(v, load(rows[1] + offset + 4 * kStride), 3);
  }
  template <int kStride>
  static BCY_INLINE void load_chunk(const uint8_t* const* rows, int offset, Words* d) {
    const __m512i a = sixteen<kStride>(rows, offset);
    const __m512i b = sixteen<kStride>(rows, offset + kStride);
    const __m512i c = sixteen<kStride>(rows, offset + 2 * kStride);
    const __m512i e = sixteen<kStride>(rows, offset + 3 * kStride);
    const __m512i ab_low = _mm512_unpacklo_epi32(a, b), ab_high = _mm512_unpackhi_epi32(a, b);
    const __m512i ce_low = _mm512_unpacklo_epi32(c, e), ce_high = _mm512_unpackhi_epi32(c, e);
    d[0] = (Words)_mm512_unpacklo_epi64(ab_low, ce_low);
    d[1] = (Words)_mm512_unpackhi_epi64(ab_low, ce_low);
    d[2] = (Words)_mm512_unpacklo_epi64(ab_high, ce_high);
    d[3] = (Words)_mm512_unpackhi_epi64(ab_high, ce_high);
  }

  static BCY_INLINE Floats half_to_float(Words w) {
    return (Floats)_mm512_cvtph_ps(_mm512_cvtepi32_epi16(bits(w)));
  }
  template <class Integers>
  static BCY_INLINE Floats to_float(Integers w) {
    return (Floats)_mm512_cvtepi32_ps((__m512i)w);
  }
  static BCY_INLINE Floats as_float(Words w) { return (Floats)w; }

  template <uint32_t mask>
  static BCY_INLINE Words select(Words a, Words b) {
    return (Words)_mm512_ternarylogic_epi32(_mm512_set1_epi32(int(mask)), bits(a), bits(b), 0xca);
  }
  template <int i>
  static BCY_INLINE Words copy_byte(Words w) {
    const __m128i places = _mm_setr_epi8(i, i, i, i, 4 + i, 4 + i, 4 + i, 4 + i, 8 + i, 8 + i,
                                         8 + i, 8 + i, 12 + i, 12 + i, 12 + i, 12 + i);
    return (Words)_mm512_shuffle_epi8(bits(w), _mm512_broadcast_i32x4(places));
  }
  template <uint32_t mask, int n>
  static BCY_INLINE Words add_where(Words w, Words tested) {
    const __mmask64 set = _mm512_test_epi8_mask(bits(tested), _mm512_set1_epi32(int(mask)));
    return (Words)_mm512_mask_add_epi8(bits(w), set, bits(w), _mm512_set1_epi8(n));
  }
  static BCY_INLINE Words look_up(Table16 table, uint32_t offset, Words w) {
    __m128i entries;
    memcpy(&entries, &table, sizeof entries);
    entries = _mm_add_epi8(entries, _mm_set1_epi32(int(offset)));
    return (Words)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(entries), bits(w));
  }

  static BCY_INLINE __m512i eight(const uint8_t* p) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  template <int kMax, int kWords, int kStride = 1>
  static BCY_INLINE Ints dot(const Words* codes, const uint8_t* u, const uint8_t* correction) {
    __m512i sum = correction ? eight(correction) : _mm512_setzero_si512();
    __m512i odd = _mm512_setzero_si512();
    for (int k = 0; k < kWords; k += 2) {
      sum = _mm512_dpbusd_epi32(sum, bits(codes[k]), eight(u + 4 * kLanes * kStride * k));
      odd = _mm512_dpbusd_epi32(odd, bits(codes[k + 1]), eight(u + 4 * kLanes * kStride * (k + 1)));
    }
    return (Ints)_mm512_add_epi32(sum, odd);
  }
  static BCY_INLINE Ints add_pairs(Ints sum, Words a, const uint8_t* p) {
    return (Ints)_mm512_dpwssd_epi32((__m512i)sum, bits(a), eight(p));
  }
  static BCY_INLINE Floats broadcast(const uint8_t* p) { return (Floats)eight(p); }

  static BCY_INLINE Mask mask(uint8_t lanes) { return Mask(lanes | lanes << 8); }
  static BCY_INLINE Floats fma_where(Mask mask, Floats a, Floats b, Floats c) {
    return (Floats)_mm512_mask3_fmadd_ps((__m512)a, (__m512)b, (__m512)c, mask);
  }
  static BCY_INLINE void meet(Floats sums, float* out) {
    __m512 s = (__m512)sums;
    s = _mm512_add_ps(s, _mm512_shuffle_f32x4(s, s, 0xb1));
    s = _mm512_add_ps(s, _mm512_permute_ps(s, 0x4e));
    s = _mm512_add_ps(s, _mm512_permute_ps(s, 0xb1));
    out[0] = _mm512_cvtss_f32(s);
    out[1] = _mm_cvtss_f32(_mm512_extractf32x4_ps(s, 2));
  }

  static BCY_INLINE int largest(Ints v) { return _mm512_reduce_max_epi32((__m512i)v); }
  static BCY_INLINE int total(Ints v) { return _mm512_reduce_add_epi32((__m512i)v); }
  static BCY_INLINE Ints round(Floats v) { return (Ints)_mm512_cvtps_epi32((__m512)v); }
  static BCY_INLINE void narrow(Ints v, int8_t* out) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8((__m512i)v));
  }

  template <int i, bool is_unsigned, class Codes>
  static BCY_INLINE Floats widen(Codes codes) {
    const __m128i bytes = _mm256_extracti128_si256((__m256i)codes, i);
    return to_float(is_unsigned ? _mm512_cvtepu8_epi32(bytes) : _mm512_cvtepi8_epi32(bytes));
  }
};

}  // namespace
}  // namespace bcy::cpu
