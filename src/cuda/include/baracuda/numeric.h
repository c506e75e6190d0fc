// SPDX-License-Identifier: Apache-2.0
// Float arithmetic with every rounding written out, and the loads and conversions that both
// backends share.
//
// Everything here is forced inline: CPU sources are compiled for several instruction sets, and an
// out-of-line copy made for one of them must never be picked by the linker for a processor without
// it.
#pragma once

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "baracuda/instructions.cuh"
#define BCY_INLINE __host__ __device__ __forceinline__
#else
#include <cmath>
#ifdef __F16C__
#include <immintrin.h>
#endif
#define BCY_INLINE inline __attribute__((always_inline))
#endif

namespace bcy {

BCY_INLINE float as_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

BCY_INLINE uint32_t as_bits(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

BCY_INLINE float fma(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return std::fmaf(a, b, c);
#endif
}

BCY_INLINE float mul(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

BCY_INLINE float add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

BCY_INLINE float div(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

// To the nearest integer, ties to even.
BCY_INLINE float round_to_even(float x) {
#ifdef __CUDA_ARCH__
  return rintf(x);
#else
  return std::nearbyintf(x);
#endif
}

BCY_INLINE bool is_finite(float x) { return (as_bits(x) & 0x7f800000u) != 0x7f800000u; }
BCY_INLINE bool is_nan(float x) { return (as_bits(x) & 0x7fffffffu) > 0x7f800000u; }

// ---- half and bfloat16, carried as their bits -------------------------------------------------------------------

BCY_INLINE float half_to_float(uint16_t h) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(h));
#elif defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = uint32_t(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x0400u) return as_float(sign | ((magnitude << 13) + 0x38000000u));
  // A subnormal half is its integer times 2^-24, exact in float.
  return as_float(sign | as_bits(float(magnitude) * 0x1p-24f));
#endif
}

// To nearest, ties to even; every NaN becomes 0x7e00.
BCY_INLINE uint16_t float_to_half(float x) {
  if (is_nan(x)) return 0x7e00u;
#ifdef __CUDA_ARCH__
  return __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t sign = as_bits(x) >> 16 & 0x8000u;
  const uint32_t magnitude = as_bits(x) & 0x7fffffffu;
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to 65536 or beyond
  if (magnitude < 0x38800000u) {  // below 2^-14: a multiple of 2^-24
    // Adding 0.5 leaves the result's last bit worth 2^-24, so the addition rounds as the conversion
    // must.
    return uint16_t(sign | (as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u));
  }
  return uint16_t(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
#endif
}

BCY_INLINE float bfloat16_to_float(uint16_t b) { return as_float(uint32_t(b) << 16); }

// To nearest, ties to even; every NaN becomes 0x7fc0.
BCY_INLINE uint16_t float_to_bfloat16(float x) {
  if (is_nan(x)) return 0x7fc0u;
  const uint32_t bits = as_bits(x);
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// One NaN for all, so that equal results are equal bits.
BCY_INLINE float canonical(float x) { return is_nan(x) ? as_float(0x7fc00000u) : x; }

// Element types of activations and outputs.
struct F32 {
  using Storage = float;
  static BCY_INLINE float load(const Storage* p) { return *p; }
  static BCY_INLINE Storage round(float x) { return canonical(x); }
};
struct F16 {
  using Storage = uint16_t;
  static BCY_INLINE float load(const Storage* p) { return half_to_float(*p); }
  static BCY_INLINE Storage round(float x) { return float_to_half(x); }
};
struct BF16 {
  using Storage = uint16_t;
  static BCY_INLINE float load(const Storage* p) { return bfloat16_to_float(*p); }
  static BCY_INLINE Storage round(float x) { return float_to_bfloat16(x); }
};

// ---- words of four bytes ----------------------------------------------------------------------------------------

BCY_INLINE int byte_of(uint32_t word, int i) {
#ifdef __CUDA_ARCH__
  return int(__byte_perm(word, 0, 0x4440 + i));
#else
  return int(word >> 8 * i & 0xffu);
#endif
}

// Byte i, less an offset, as a float.
BCY_INLINE float byte_to_float(uint32_t word, int i, int offset = 0) {
#ifdef __CUDA_ARCH__
  // The byte in the low mantissa bits of 2^23.
  return as_float(__byte_perm(word, 0x4b000000u, 0x7440 + i)) - float(0x800000 + offset);
#else
  return float(byte_of(word, i) - offset);
#endif
}

// Bits of a word from one place to another.
BCY_INLINE constexpr uint32_t move_bits(uint32_t word, int from, int to) {
  return from > to ? word >> (from - to) : word << (to - from);
}

// (x & mask) ^ flip.
BCY_INLINE uint32_t mask_and_flip(uint32_t x, uint32_t mask, uint32_t flip) {
#ifdef __CUDA_ARCH__
  return mask_and_flip_words(x, mask, flip);
#else
  return (x & mask) ^ flip;
#endif
}

// The same where `Flips`, else x & mask, which compilers merge with what follows.
template <bool Flips>
BCY_INLINE uint32_t mask_and_flip_if(uint32_t x, uint32_t mask, uint32_t flip) {
  if constexpr (Flips) return mask_and_flip(x, mask, flip);
  return x & mask;
}

// Bit i of four goes to bit Place of byte i.
template <int Place>
BCY_INLINE uint32_t spread_bits(uint32_t four) {
  return (four & 0xfu) * (0x00204081u << Place) & 0x01010101u << Place;
}

}  // namespace bcy
