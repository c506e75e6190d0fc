// SPDX-License-Identifier: Apache-2.0
// Integer tensor-core products of 16 weight rows by 8 tokens, exact in int32.
//
// A warp holds the operands as PTX defines them for mma.m16n8k32: with r = lane / 4 and t = lane %
// 4, word t of a half is its elements 4t .. 4t + 3.
//   a[0], a[1]  row r, row r + 8, first half of the group (16 elements);  a[2], a[3]  the same,
//   second half b[0], b[1]  token r, first and second half c[0], c[1]  row r, tokens 2t and 2t + 1;
//   c[2], c[3]  row r + 8
#pragma once

#include <stdint.h>

namespace bcy {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800

// Turing multiplies 8 rows by 8 tokens by 16 elements.
template <bool UnsignedWeights>
__device__ __forceinline__ void mma_8x8x16(int& c0, int& c1, uint32_t a, uint32_t b) {
  if constexpr (UnsignedWeights) {
    asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+r"(c0), "+r"(c1)
        : "r"(a), "r"(b));
  } else {
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+r"(c0), "+r"(c1)
        : "r"(a), "r"(b));
  }
}

#endif

// c += one half of a group: 16 elements.
template <bool UnsignedWeights>
__device__ __forceinline__ void mma_half(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  mma_8x8x16<UnsignedWeights>(c[0], c[1], a0, b);
  mma_8x8x16<UnsignedWeights>(c[2], c[3], a1, b);
#else
  if constexpr (UnsignedWeights) {
    asm("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, "
        "%1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, "
        "%1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
  }
#endif
}

// c += a whole group: 32 elements.
template <bool UnsignedWeights>
__device__ __forceinline__ void mma_group(int (&c)[4], const uint32_t (&a)[4],
                                          const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  mma_half<UnsignedWeights>(c, a[0], a[1], b[0]);
  mma_half<UnsignedWeights>(c, a[2], a[3], b[1]);
#else
  if constexpr (UnsignedWeights) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

}  // namespace bcy
