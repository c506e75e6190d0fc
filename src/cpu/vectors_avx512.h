// SPDX-License-Identifier: Apache-2.0
// AVX-512 vectors of floats.
#pragma once

#include <immintrin.h>

#include "baracuda/numeric.h"

// GCC takes the deliberately undefined operand inside its own intrinsics for a mistake (PR 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

namespace bcy::cpu {
namespace {

struct Avx512Floats {
  typedef uint32_t Words __attribute__((vector_size(64)));
  typedef float Floats __attribute__((vector_size(64)));
  using Mask = __mmask16;
  static constexpr int kWidth = 16;

  static BCY_INLINE __m512i bits(Words w) { return (__m512i)w; }

  static BCY_INLINE Floats load(F32, const float* x) { return (Floats)_mm512_loadu_ps(x); }
  static BCY_INLINE Floats load(F16, const uint16_t* x) {
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
  static BCY_INLINE Floats load(BF16, const uint16_t* x) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
  }
  static BCY_INLINE Mask nan(Floats v) {
    return _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  }
  static BCY_INLINE void store(F32, float* y, Floats v) {
    const __m512i canonical = _mm512_set1_epi32(0x7fc00000);
    _mm512_storeu_si512(y, _mm512_mask_mov_epi32((__m512i)v, nan(v), canonical));
  }
  static BCY_INLINE void store(F16, uint16_t* y, Floats v) {
    const __m256i halves = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
    const __m256i canonical = _mm256_set1_epi16(0x7e00);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y),
                        _mm256_mask_mov_epi16(halves, nan(v), canonical));
  }
  static BCY_INLINE void store(BF16, uint16_t* y, Floats v) {
    const Words w = (Words)v;
    const __m256i rounded = _mm512_cvtepi32_epi16(bits((w + 0x7fffu + (w >> 16 & 1u)) >> 16));
    const __m256i canonical = _mm256_set1_epi16(0x7fc0);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y),
                        _mm256_mask_mov_epi16(rounded, nan(v), canonical));
  }

  static BCY_INLINE Floats fma(Floats a, Floats b, Floats c) {
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  }
  static BCY_INLINE Floats splat(float value) { return (Floats)_mm512_set1_ps(value); }
};

}  // namespace
}  // namespace bcy::cpu
