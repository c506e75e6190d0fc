// SPDX-License-Identifier: Apache-2.0
// AVX2 for products.h: one row of eight lanes.
#pragma once

#include <immintrin.h>

#include "cpu/gguf/layout.h"
#include "cpu/vectors_avx2.h"

namespace bcy::cpu {
namespace {

struct Avx2 : Avx2Floats {
  typedef int32_t Ints __attribute__((vector_size(32)));
  using Mask = __m256;
  static constexpr int kRows = 1;
  static constexpr bool kAnyByte = false;

  static BCY_INLINE __m256i eight(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }

  template <int kStride>
  static BCY_INLINE __m256i eight_lanes(const uint8_t* p) {
    const auto load = [](const uint8_t* at) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    };
    return _mm256_inserti128_si256(_mm256_castsi128_si256(load(p)), load(p + 4 * kStride), 1);
  }
  template <int kStride>
  static BCY_INLINE void load_chunk(const uint8_t* const* rows, int offset, Words* d) {
    const uint8_t* const p = rows[0] + offset;
    const __m256i a = eight_lanes<kStride>(p), b = eight_lanes<kStride>(p + kStride);
    const __m256i c = eight_lanes<kStride>(p + 2 * kStride);
    const __m256i e = eight_lanes<kStride>(p + 3 * kStride);
    const __m256i ab_low = _mm256_unpacklo_epi32(a, b), ab_high = _mm256_unpackhi_epi32(a, b);
    const __m256i ce_low = _mm256_unpacklo_epi32(c, e), ce_high = _mm256_unpackhi_epi32(c, e);
    d[0] = (Words)_mm256_unpacklo_epi64(ab_low, ce_low);
    d[1] = (Words)_mm256_unpackhi_epi64(ab_low, ce_low);
    d[2] = (Words)_mm256_unpacklo_epi64(ab_high, ce_high);
    d[3] = (Words)_mm256_unpackhi_epi64(ab_high, ce_high);
  }

  static BCY_INLINE Floats half_to_float(Words w) { return (Floats)_mm256_cvtph_ps(low_halves(w)); }
  template <class Integers>
  static BCY_INLINE Floats to_float(Integers w) {
    return (Floats)_mm256_cvtepi32_ps((__m256i)w);
  }
  static BCY_INLINE Floats as_float(Words w) { return (Floats)w; }

  template <uint32_t mask>
  static BCY_INLINE Words select(Words a, Words b) {
    return (a & mask) | (b & ~mask);
  }
  template <int i>
  static BCY_INLINE Words copy_byte(Words w) {
    const __m128i places = _mm_setr_epi8(i, i, i, i, 4 + i, 4 + i, 4 + i, 4 + i, 8 + i, 8 + i,
                                         8 + i, 8 + i, 12 + i, 12 + i, 12 + i, 12 + i);
    return (Words)_mm256_shuffle_epi8(bits(w), _mm256_broadcastsi128_si256(places));
  }
  template <uint32_t mask, int n>
  static BCY_INLINE Words add_where(Words w, Words tested) {
    const __m256i one = _mm256_set1_epi32(int(mask));
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(bits(tested), one), one);
    return w + ((Words)set & (uint32_t(n) * 0x01010101u));
  }
  static BCY_INLINE Words look_up(Table16 table, uint32_t offset, Words w) {
    __m128i entries;
    memcpy(&entries, &table, sizeof entries);
    entries = _mm_add_epi8(entries, _mm_set1_epi32(int(offset)));
    return (Words)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), bits(w));
  }

  // maddubs adds two products in 16 bits, with saturation: as many of its results are added there
  // as fit.
  template <int kMax, int kWords, int kStride = 1>
  static BCY_INLINE Ints dot(const Words* codes, const uint8_t* u, const uint8_t* correction) {
    const __m256i ones = _mm256_set1_epi16(1);
    if constexpr (kMax > 127) {
      // Back to signed codes, which need no correction; the sign moves to u.
      __m256i sum = _mm256_setzero_si256();
      for (int k = 0; k < kWords; ++k) {
        const __m256i code = bits(codes[k] ^ 0x80808080u);
        const __m256i signed_u = _mm256_sign_epi8(eight(u + 4 * kLanes * kStride * k), code);
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(code), signed_u);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
      }
      return (Ints)sum;
    } else {
      constexpr int kFit = 32767 / (2 * 127 * kMax) < 2   ? 1
                           : 32767 / (2 * 127 * kMax) < 4 ? 2
                           : 32767 / (2 * 127 * kMax) < 8 ? 4
                                                          : 8;
      constexpr int kBatch = kFit < kWords ? kFit : kWords;
      __m256i sum = correction ? eight(correction) : _mm256_setzero_si256();
      for (int k = 0; k < kWords; k += kBatch) {
        __m256i pairs = _mm256_maddubs_epi16(bits(codes[k]), eight(u + 4 * kLanes * kStride * k));
        for (int j = 1; j < kBatch; ++j) {
          pairs = _mm256_add_epi16(
              pairs,
              _mm256_maddubs_epi16(bits(codes[k + j]), eight(u + 4 * kLanes * kStride * (k + j))));
        }
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
      }
      return (Ints)sum;
    }
  }
  static BCY_INLINE Ints add_pairs(Ints sum, Words a, const uint8_t* p) {
    return sum + (Ints)_mm256_madd_epi16(bits(a), eight(p));
  }
  static BCY_INLINE Floats broadcast(const uint8_t* p) { return (Floats)eight(p); }

  static BCY_INLINE Mask mask(uint8_t lanes) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return (__m256)_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(lanes), lane), lane);
  }
  static BCY_INLINE Floats fma_where(Mask mask, Floats a, Floats b, Floats c) {
    return (Floats)_mm256_blendv_ps((__m256)c, (__m256)fma(a, b, c), mask);
  }
  static BCY_INLINE void meet(Floats sums, float* out) {
    __m128 s =
        _mm_add_ps(_mm256_castps256_ps128((__m256)sums), _mm256_extractf128_ps((__m256)sums, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    s = _mm_add_ss(s, _mm_shuffle_ps(s, s, 1));
    out[0] = _mm_cvtss_f32(s);
  }

  static BCY_INLINE int largest(Ints v) {
    __m128i s =
        _mm_max_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
  }
  static BCY_INLINE int total(Ints v) {
    __m128i s =
        _mm_add_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
  }
  static BCY_INLINE Ints round(Floats v) { return (Ints)_mm256_cvtps_epi32((__m256)v); }
  static BCY_INLINE void narrow(Ints v, int8_t* out) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v),
                                          _mm256_extracti128_si256((__m256i)v, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packs_epi16(words, words));
  }

  template <int i, bool is_unsigned, class Codes>
  static BCY_INLINE Floats widen(Codes codes) {
    const __m128i half = _mm256_extracti128_si256((__m256i)codes, i / 2);
    const __m128i bytes = i % 2 ? _mm_unpackhi_epi64(half, half) : half;
    return to_float(is_unsigned ? _mm256_cvtepu8_epi32(bytes) : _mm256_cvtepi8_epi32(bytes));
  }
};

}  // namespace
}  // namespace bcy::cpu
