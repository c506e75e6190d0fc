// SPDX-License-Identifier: Apache-2.0
// Instructions on words that CUDA C++ has no name for. PTX is written in four files: this one,
// mma.cuh, warpgroup.cuh and async.cuh in src/cuda/common.
#pragma once

#include <stdint.h>

namespace bcy {

// Keeps the compiler from turning a branch into predicates.
__device__ __forceinline__ void stay_branch() { asm volatile(""); }

// (x & mask) ^ flip in one instruction: compilers make two of it when both are constants.
__device__ __forceinline__ uint32_t mask_and_flip_words(uint32_t x, uint32_t mask, uint32_t flip) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(result) : "r"(x), "r"(mask), "r"(flip));
  return result;
}

// a * b + c by the pipe that multiplies: compilers factor sums of products, for which they add by
// the one that most other instructions on words take.
__device__ __forceinline__ uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}

// A byte permute that fills a byte with the top bit of the one it picks where the fourth bit of its
// selector is set.
__device__ __forceinline__ uint32_t permute_or_fill(uint32_t low, uint32_t high, uint32_t select) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(select));
  return result;
}

// sum + four codes times four activations.
template <bool UnsignedCodes, bool UnsignedX = false>
__device__ __forceinline__ int dot_of_four(uint32_t codes, uint32_t x, int sum) {
  if constexpr (UnsignedCodes && UnsignedX) {
    asm("dp4a.u32.u32 %0, %1, %2, %0;" : "+r"(sum) : "r"(codes), "r"(x));
  } else if constexpr (UnsignedCodes) {
    asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(codes), "r"(x));
  } else if constexpr (UnsignedX) {
    asm("dp4a.s32.u32 %0, %1, %2, %0;" : "+r"(sum) : "r"(codes), "r"(x));
  } else {
    sum = __dp4a(int(codes), int(x), sum);
  }
  return sum;
}

// The compiler takes a pointer for one that it cannot work out again.
template <class T>
__device__ __forceinline__ void keep_in_register(T*& pointer) {
  asm volatile("" : "+l"(pointer));
}

}  // namespace bcy
