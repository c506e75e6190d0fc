// SPDX-License-Identifier: Apache-2.0
// Tensor-core products of 16 weight rows by 8 tokens: of integers, exact in int32, and of 16-bit
// floats.
//
// A warp holds the operands as PTX defines them for mma.m16n8k32: with r = lane / 4 and t = lane %
// 4, word t of a half is its elements 4t .. 4t + 3.
//
//   a[0], a[1]  row r, row r + 8, first half of the group (16 elements)
//   a[2], a[3]  the same, second half
//   b[0], b[1]  token r, first and second half
//   c[0], c[1]  row r, tokens 2t and 2t + 1
//   c[2], c[3]  row r + 8
#pragma once

#include <stdint.h>

#include <type_traits>

#include "baracuda/numeric.h"

namespace bcy {

// Of weights and activations, each signed or not.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
// Turing multiplies 8 rows by 8 tokens by 16 elements.
#define BCY_MMA_8(a_type, b_type)                               \
  asm("mma.sync.aligned.m8n8k16.row.col.s32." a_type "." b_type \
      ".s32 {%0, %1}, {%2}, {%3}, "                             \
      "{%0, %1};"                                               \
      : "+r"(c0), "+r"(c1)                                      \
      : "r"(a), "r"(b))
#else
#define BCY_MMA_HALF(a_type, b_type)                             \
  asm("mma.sync.aligned.m16n8k16.row.col.s32." a_type "." b_type \
      ".s32 {%0, %1, %2, %3}, "                                  \
      "{%4, %5}, {%6}, {%0, %1, %2, %3};"                        \
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])           \
      : "r"(a0), "r"(a1), "r"(b))
#define BCY_MMA_GROUP(a_type, b_type)                            \
  asm("mma.sync.aligned.m16n8k32.row.col.s32." a_type "." b_type \
      ".s32 {%0, %1, %2, %3}, "                                  \
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"            \
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])           \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#endif
#define BCY_MMA_TYPES(mma)                      \
  if constexpr (UnsignedWeights && UnsignedX) { \
    mma("u8", "u8");                            \
  } else if constexpr (UnsignedWeights) {       \
    mma("u8", "s8");                            \
  } else if constexpr (UnsignedX) {             \
    mma("s8", "u8");                            \
  } else {                                      \
    mma("s8", "s8");                            \
  }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <bool UnsignedWeights, bool UnsignedX>
__device__ __forceinline__ void mma_8x8x16(int& c0, int& c1, uint32_t a, uint32_t b) {
  BCY_MMA_TYPES(BCY_MMA_8)
}
#endif

// c += one half of a group: 16 elements.
template <bool UnsignedWeights, bool UnsignedX = false>
__device__ __forceinline__ void mma_half(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  mma_8x8x16<UnsignedWeights, UnsignedX>(c[0], c[1], a0, b);
  mma_8x8x16<UnsignedWeights, UnsignedX>(c[2], c[3], a1, b);
#else
  BCY_MMA_TYPES(BCY_MMA_HALF)
#endif
}

// c += a whole group: 32 elements.
template <bool UnsignedWeights, bool UnsignedX = false>
__device__ __forceinline__ void mma_group(int (&c)[4], const uint32_t (&a)[4],
                                          const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  mma_half<UnsignedWeights, UnsignedX>(c, a[0], a[1], b[0]);
  mma_half<UnsignedWeights, UnsignedX>(c, a[2], a[3], b[1]);
#else
  BCY_MMA_TYPES(BCY_MMA_GROUP)
#endif
}

#undef BCY_MMA_8
#undef BCY_MMA_HALF
#undef BCY_MMA_GROUP
#undef BCY_MMA_TYPES

// ---- floats -----------------------------------------------------------------------------------------------------

// c += a * b, 16 rows by 16 elements times 8 tokens: a holds rows r and r + 8 of elements 2 t and
// 2 t + 1, then of elements 8 on, b those elements of token r; c tokens 2 t and 2 t + 1 of row r,
// then of row r + 8.
template <class X>
__device__ __forceinline__ void mma_floats(float (&c)[4], uint2 a, uint2 a8, uint32_t b,
                                           uint32_t b8) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<X, F16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a8.x), "r"(a8.y), "r"(b), "r"(b8));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a8.x), "r"(a8.y), "r"(b), "r"(b8));
  }
#endif
}

}  // namespace bcy
