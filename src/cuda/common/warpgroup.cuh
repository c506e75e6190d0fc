// SPDX-License-Identifier: Apache-2.0
// Tensor-core products of a warpgroup, four warps that start at a multiple of four: 64 rows by 64
// elements by 8, 16 or 32 tokens, or by 32 codes by 16 or 32 tokens, whose activations are in
// shared memory. Hopper's own instruction reads those itself, and runs while its warps do other
// things; where it is not to be had, the same products by mma.cuh. Both give the same bits.
#pragma once

#include "cuda/common/async.cuh"
#include "cuda/common/mma.cuh"

namespace bcy {

constexpr int kWarpgroupElements = 64;

// Bytes of the activations: pieces of eight elements, [piece][token].
template <int Tokens>
constexpr int kWarpgroupX = kWarpgroupElements * 2 * Tokens;

// The registers of a warpgroup's threads change hands: all four warps call it. First those that
// need few leave theirs, then the others take them.
template <int Registers>
__device__ __forceinline__ void leave_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
#endif
}
template <int Registers>
__device__ __forceinline__ void take_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
#endif
}

// How tensor cores find the codes of a group at a shared address: pieces of eight tokens' sixteen
// codes, 128 bytes, follow each other by tokens, of which there are Tokens, then by codes. An
// address that is 16 n further on has n more.
template <int Tokens>
__device__ __forceinline__ uint32_t describe_codes(uint32_t address) {
  return (address & 0x3ffff) / 16 | uint32_t(Tokens * 16 / 16) << 16;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Starts sums = a * x. a: 16 elements each, as mma_floats takes them: of this warp's 16 rows. x: a
// shared address. Neither may change, nor sums be used, before warpgroup_wait.
//
// All in one statement: of several on the same variables the compiler may take the results of one
// for those of another.
#define BCY_STEP(SHAPE, TYPE, SUMS, A, X, ADD)                                                    \
  "wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE " {" SUMS "}, {" A "}, " X ", " ADD \
  ", 1, 1, 0;\n"
#define BCY_STEPS(SHAPE, TYPE, SUMS, A0, X0, A1, X1, A2, X2, A3, X3)                    \
  "wgmma.fence.sync.aligned;\n" BCY_STEP(SHAPE, TYPE, SUMS, A0, X0, "0")                \
      BCY_STEP(SHAPE, TYPE, SUMS, A1, X1, "1") BCY_STEP(SHAPE, TYPE, SUMS, A2, X2, "1") \
          BCY_STEP(SHAPE, TYPE, SUMS, A3, X3, "1") "wgmma.commit_group.sync.aligned;\n"
#define BCY_SUMS(KIND, N) KIND(sums[N][0]), KIND(sums[N][1]), KIND(sums[N][2]), KIND(sums[N][3])
#define BCY_A(I) "r"(a[I][0]), "r"(a[I][1]), "r"(a[I][2]), "r"(a[I][3])
#define BCY_OPERANDS BCY_A(0), BCY_A(1), BCY_A(2), BCY_A(3), "l"(x0), "l"(x1), "l"(x2), "l"(x3)
#define BCY_MULTIPLY_8(TYPE)                                                          \
  asm volatile(BCY_STEPS("m64n8k16", TYPE, "%0, %1, %2, %3", "%4, %5, %6, %7", "%20", \
                         "%8, %9, %10, %11", "%21", "%12, %13, %14, %15", "%22",      \
                         "%16, %17, %18, %19", "%23")                                 \
               : BCY_SUMS("=f", 0)                                                    \
               : BCY_OPERANDS                                                         \
               : "memory")
#define BCY_MULTIPLY_16(TYPE)                                                                     \
  asm volatile(BCY_STEPS("m64n16k16", TYPE, "%0, %1, %2, %3, %4, %5, %6, %7", "%8, %9, %10, %11", \
                         "%24", "%12, %13, %14, %15", "%25", "%16, %17, %18, %19", "%26",         \
                         "%20, %21, %22, %23", "%27")                                             \
               : BCY_SUMS("=f", 0), BCY_SUMS("=f", 1)                                             \
               : BCY_OPERANDS                                                                     \
               : "memory")
#define BCY_MULTIPLY_32(TYPE)                                                                    \
  asm volatile(BCY_STEPS("m64n32k16", TYPE,                                                      \
                         "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15", \
                         "%16, %17, %18, %19", "%32", "%20, %21, %22, %23", "%33",               \
                         "%24, %25, %26, %27", "%34", "%28, %29, %30, %31", "%35")               \
               : BCY_SUMS("=f", 0), BCY_SUMS("=f", 1), BCY_SUMS("=f", 2), BCY_SUMS("=f", 3)      \
               : BCY_OPERANDS                                                                    \
               : "memory")

template <class X, int Tokens>
__device__ __forceinline__ void warpgroup_multiply(float (&sums)[Tokens / 8][4],
                                                   const uint32_t (&a)[4][4], uint32_t x) {
  static_assert(Tokens == 8 || Tokens == 16 || Tokens == 32);
  // Pieces of eight tokens' eight elements, 128 bytes, follow each other by tokens, then by
  // elements.
  constexpr uint64_t kLayout = uint64_t{128 / 16} << 32 | uint64_t{Tokens * 16 / 16} << 16;
  constexpr int kStep = 16 * 2 * Tokens / 16;
  const uint64_t x0 = kLayout | (x & 0x3ffff) / 16;
  const uint64_t x1 = x0 + kStep, x2 = x1 + kStep, x3 = x2 + kStep;
  constexpr bool kHalf = std::is_same_v<X, F16>;
  if constexpr (Tokens == 8) {
    if constexpr (kHalf) {
      BCY_MULTIPLY_8("f16");
    } else {
      BCY_MULTIPLY_8("bf16");
    }
  } else if constexpr (Tokens == 16) {
    if constexpr (kHalf) {
      BCY_MULTIPLY_16("f16");
    } else {
      BCY_MULTIPLY_16("bf16");
    }
  } else {
    if constexpr (kHalf) {
      BCY_MULTIPLY_32("f16");
    } else {
      BCY_MULTIPLY_32("bf16");
    }
  }
}

template <int Tokens>
__device__ __forceinline__ void warpgroup_wait(float (&sums)[Tokens / 8][4]) {
  if constexpr (Tokens == 8) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" : BCY_SUMS("+f", 0)::"memory");
  } else if constexpr (Tokens == 16) {
    asm volatile("wgmma.wait_group.sync.aligned 0;"
                 : BCY_SUMS("+f", 0), BCY_SUMS("+f", 1)::"memory");
  } else {
    asm volatile("wgmma.wait_group.sync.aligned 0;"
                 : BCY_SUMS("+f", 0), BCY_SUMS("+f", 1), BCY_SUMS("+f", 2),
                   BCY_SUMS("+f", 3)::"memory");
  }
}

// Starts sums = (the sum of addends) * codes: the integers of a group. An addend: of this warp's 16
// rows, as mma_group takes them. codes: of Tokens tokens, as described.
#define BCY_CODES(SHAPE, SUMS, A, ADD) \
  "wgmma.mma_async.sync.aligned." SHAPE ".s32.s8.s8 {" SUMS "}, {" A "}, x, " ADD ";\n"
#define BCY_MULTIPLY_CODES(SHAPE, SUMS, FIRST, SECOND, LOW, HIGH, ...)                            \
  if constexpr (Addends == 1) {                                                                   \
    asm volatile("{\n.reg .b64 x;\nmov.b64 x, {" LOW ", " HIGH                                  \
                 "};\nwgmma.fence.sync.aligned;\n" BCY_CODES(SHAPE, SUMS, FIRST,               \
                                                             "0") "wgmma.commit_group.sync."    \
                                                                  "aligned;\n}"                 \
                 : __VA_ARGS__                                                                  \
                 : BCY_ADDEND(0), BCY_ADDEND(0), "r"(codes), "n"(128 / 16)); \
  } else {                                                                                        \
    asm volatile("{\n.reg .b64 x;\nmov.b64 x, {" LOW ", " HIGH                                    \
                 "};\nwgmma.fence.sync.aligned;\n" BCY_CODES(SHAPE, SUMS, FIRST, "0")             \
                     BCY_CODES(SHAPE, SUMS, SECOND, "1") "wgmma.commit_group.sync.aligned;\n}"    \
                 : __VA_ARGS__                                                                    \
                 : BCY_ADDEND(0), BCY_ADDEND(1), "r"(codes), "n"(128 / 16));                      \
  }
#define BCY_ADDEND(I) "r"(addends[I][0]), "r"(addends[I][1]), "r"(addends[I][2]), "r"(addends[I][3])

template <int Tokens, int Addends>
__device__ __forceinline__ void warpgroup_multiply_codes(int (&sums)[Tokens / 8][4],
                                                         const uint32_t (&addends)[Addends][4],
                                                         uint32_t codes) {
  static_assert((Tokens == 16 || Tokens == 32) && Addends <= 2);
  if constexpr (Tokens == 16) {
    BCY_MULTIPLY_CODES("m64n16k32", "%0, %1, %2, %3, %4, %5, %6, %7", "%8, %9, %10, %11",
                       "%12, %13, %14, %15", "%16", "%17", BCY_SUMS("=r", 0), BCY_SUMS("=r", 1))
  } else {
    BCY_MULTIPLY_CODES("m64n32k32",
                       "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15",
                       "%16, %17, %18, %19", "%20, %21, %22, %23", "%24", "%25", BCY_SUMS("=r", 0),
                       BCY_SUMS("=r", 1), BCY_SUMS("=r", 2), BCY_SUMS("=r", 3))
  }
}

// Until all but the last Pending of them are done, sums among those that are.
template <int Pending, int Tiles>
__device__ __forceinline__ void warpgroup_wait_codes(int (&sums)[Tiles][4]) {
  if constexpr (Tiles == 2) {
    asm volatile("wgmma.wait_group.sync.aligned %8;"
                 : BCY_SUMS("+r", 0), BCY_SUMS("+r", 1)
                 : "n"(Pending));
  } else {
    asm volatile("wgmma.wait_group.sync.aligned %16;"
                 : BCY_SUMS("+r", 0), BCY_SUMS("+r", 1), BCY_SUMS("+r", 2), BCY_SUMS("+r", 3)
                 : "n"(Pending));
  }
}

#undef BCY_STEP
#undef BCY_STEPS
#undef BCY_SUMS
#undef BCY_A
#undef BCY_OPERANDS
#undef BCY_CODES
#undef BCY_MULTIPLY_CODES
#undef BCY_ADDEND
#undef BCY_MULTIPLY_8
#undef BCY_MULTIPLY_16
#undef BCY_MULTIPLY_32

#else

template <class X, int Tokens>
__device__ __forceinline__ void warpgroup_multiply(float (&sums)[Tokens / 8][4],
                                                   const uint32_t (&a)[4][4], uint32_t x) {
  const uint32_t here = x + threadIdx.x % 32 * 4;
#pragma unroll
  for (int n = 0; n < Tokens / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[n][i] = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      mma_floats<X>(sums[n], {a[i][0], a[i][1]}, {a[i][2], a[i][3]},
                    load_shared_word(here + 2 * i * (16 * Tokens) + n * 128),
                    load_shared_word(here + (2 * i + 1) * (16 * Tokens) + n * 128));
    }
  }
}

template <int Tokens>
__device__ __forceinline__ void warpgroup_wait(float (&)[Tokens / 8][4]) {}

template <int Tokens, int Addends>
__device__ __forceinline__ void warpgroup_multiply_codes(int (&sums)[Tokens / 8][4],
                                                         const uint32_t (&addends)[Addends][4],
                                                         uint32_t codes) {
  const uint32_t here = (codes & 0x3fff) * 16 + threadIdx.x % 32 * 4;
#pragma unroll
  for (int n = 0; n < Tokens / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[n][i] = 0;
    const uint32_t b[2] = {load_shared_word(here + n * 128),
                           load_shared_word(here + (codes >> 16) * 16 + n * 128)};
#pragma unroll
    for (const auto& a : addends) mma_group<false>(sums[n], a, b);
  }
}

template <int Pending, int Tiles>
__device__ __forceinline__ void warpgroup_wait_codes(int (&)[Tiles][4]) {}

#endif

}  // namespace bcy
