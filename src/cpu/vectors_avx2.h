// SPDX-License-Identifier: Apache-2.0
// AVX2 vectors of floats.
#pragma once

#include <immintrin.h>

#include "baracuda/numeric.h"

namespace bcy::cpu {
namespace {

struct Avx2Floats {
  typedef uint32_t Words __attribute__((vector_size(32)));
  typedef float Floats __attribute__((vector_size(32)));
  static constexpr int kWidth = 8;

  static BCY_INLINE __m256i bits(Words w) { return (__m256i)w; }

  static BCY_INLINE __m128i low_halves(Words w) {
    const __m256i low = bits(w & 0xffffu);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08));
  }

  static BCY_INLINE Floats load(F32, const float* x) { return (Floats)_mm256_loadu_ps(x); }
  static BCY_INLINE Floats load(F16, const uint16_t* x) {
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  }
  static BCY_INLINE Floats load(BF16, const uint16_t* x) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
  }
  static BCY_INLINE Words nan(Floats v) {
    return (Words)_mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q);
  }
  static BCY_INLINE void store(F32, float* y, Floats v) {
    const Words w = nan(v) ? Words{} + 0x7fc00000u : (Words)v;
    memcpy(y, &w, sizeof w);
  }
  static BCY_INLINE void store_low_halves(uint16_t* y, Words w) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y), low_halves(w));
  }
  static BCY_INLINE void store(F16, uint16_t* y, Floats v) {
    const __m128i halves = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
    const Words w = (Words)_mm256_cvtepu16_epi32(halves);
    store_low_halves(y, nan(v) ? Words{} + 0x7e00u : w);
  }
  static BCY_INLINE void store(BF16, uint16_t* y, Floats v) {
    const Words w = (Words)v;
    store_low_halves(y, nan(v) ? Words{} + 0x7fc0u : (w + 0x7fffu + (w >> 16 & 1u)) >> 16);
  }

  static BCY_INLINE Floats fma(Floats a, Floats b, Floats c) {
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  }
  static BCY_INLINE Floats splat(float value) { return (Floats)_mm256_set1_ps(value); }
};

}  // namespace
}  // namespace bcy::cpu
