// SPDX-License-Identifier: Apache-2.0
// What a group of 16 weight rows and 8 tokens comes to before the tokens' scales: integer sums of
// tensor cores times what scales the weights, in the places of mma.cuh's c.
//
// A class for each way that scales are applied, with
//   Class(upper, lower, g)                 group g of the blocks of two rows
//   multiply_offsets(g, b, offsets)        once for all rows: what they have in common, of the
//                                          activations b
//   multiply(addends, b, offsets, values)  the values of the group's operands (operands.cuh)
#pragma once

#include <type_traits>

#include "cuda/common/mma.cuh"
#include "operands.cuh"

namespace bcy {

// Rows have one scale a group; those of halves, if any, are in the operands.
template <class Format, bool ManyTokens>
class ScaledGroup {
 public:
  template <class Block>
  __device__ __forceinline__ ScaledGroup(Block upper, Block lower, int g)
      : start_(int(sum_start(shift(g)))),
        scales_{SumScale<Format>(operand_scale<Format, ManyTokens>(upper, g), shift(g)),
                SumScale<Format>(operand_scale<Format, ManyTokens>(lower, g), shift(g))} {}

  static __device__ __forceinline__ void multiply_offsets(int, const uint32_t (&)[2],
                                                          int (&)[2][4]) {}

  template <int Addends>
  __device__ __forceinline__ void multiply(const uint32_t (&addends)[Addends][4],
                                           const uint32_t (&b)[2], const int (&)[2][4],
                                           float (&values)[4]) const {
    int sums[4] = {start_, start_, start_, start_};
#pragma unroll
    for (const auto& a : addends) mma_group<Format::kUnsignedCodes>(sums, a, b);
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = scales_[i / 2].times(sums[i]);
  }

 private:
  static BCY_INLINE constexpr int shift(int g) { return operand_shift<Format, ManyTokens>(g); }

  int start_;
  SumScale<Format> scales_[2];
};

// Halves are scaled as float32: exactly, as the sum of integers is, as all are below 2^24.
template <class Format>
class ScaledHalves {
 public:
  template <class Block>
  __device__ __forceinline__ ScaledHalves(Block upper, Block lower, int g)
      : start_(int(sum_start(Format::shift(g)))),
        scales_{Format::scale(upper, g), Format::scale(lower, g)} {
    const uint32_t words[2] = {Format::half_scales(upper, g), Format::half_scales(lower, g)};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float scale = byte_to_float(words[i / 2], 2 * (g % 2) + i % 2, Format::kHalfOffset);
      half_scales_[i / 2][i % 2] = SumScale<Format>(scale, Format::shift(g));
    }
  }

  static __device__ __forceinline__ void multiply_offsets(int, const uint32_t (&)[2],
                                                          int (&)[2][4]) {}

  __device__ __forceinline__ void multiply(const uint32_t (&a)[1][4], const uint32_t (&b)[2],
                                           const int (&)[2][4], float (&values)[4]) const {
    int sums[2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int& sum : sums[half]) sum = start_;
      mma_half<Format::kUnsignedCodes>(sums[half], a[0][2 * half], a[0][2 * half + 1], b[half]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto& halves = half_scales_[i / 2];
      values[i] = scaled(add(halves[0].times(sums[0][i]), halves[1].times(sums[1][i])),
                         finite_or_nan(scales_[i / 2]));
    }
  }

 private:
  int start_;
  float scales_[2];
  SumScale<Format> half_scales_[2][2];
};

// Halves are scaled as integers, whose sum fits sum_start. Operands are unsigned codes; `offsets`:
// what is added to those times the activations.
template <class Format>
class IntegerScaledHalves {
 public:
  template <class Block>
  __device__ __forceinline__ IntegerScaledHalves(Block upper, Block lower, int g)
      : start_(int(sum_start(shift(g)))),
        scales_{SumScale<Format>(Format::scale(upper, g), shift(g)),
                SumScale<Format>(Format::scale(lower, g), shift(g))} {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      half_scales_[0][half] = signed_half_scale<Format>(upper, g, half);
      half_scales_[1][half] = signed_half_scale<Format>(lower, g, half);
    }
  }

  static __device__ __forceinline__ void multiply_offsets(int g, const uint32_t (&b)[2],
                                                          int (&offsets)[2][4]) {
    const uint32_t word = uint8_t(code_offset<Format> * (1 << shift(g))) * 0x01010101u;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int& offset : offsets[half]) offset = 0;
      mma_half<false>(offsets[half], word, word, b[half]);
    }
  }

  __device__ __forceinline__ void multiply(const uint32_t (&a)[1][4], const uint32_t (&b)[2],
                                           const int (&offsets)[2][4], float (&values)[4]) const {
    int sums[2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[half][i] = offsets[half][i];
      mma_half<true>(sums[half], a[0][2 * half], a[0][2 * half + 1], b[half]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto& halves = half_scales_[i / 2];
      values[i] = scales_[i / 2].times(start_ + halves[0] * sums[0][i] + halves[1] * sums[1][i]);
    }
  }

 private:
  static BCY_INLINE constexpr int shift(int g) { return operand_shift<Format, false>(g); }

  int start_;
  SumScale<Format> scales_[2];
  int half_scales_[2][2];
};

template <class Format, bool ManyTokens>
using GroupValues =
    std::conditional_t<scales_half_sums<Format, ManyTokens>, IntegerScaledHalves<Format>,
                       std::conditional_t<multiplies_halves<Format, ManyTokens>,
                                          ScaledHalves<Format>, ScaledGroup<Format, ManyTokens>>>;

}  // namespace bcy
