// SPDX-License-Identifier: Apache-2.0
// The order of summation: what makes every backend, tile shape and batch size give the same bits.
//
// Along K, 32 elements are a group and 256 a unit. Partial sum p of 8 takes units p, p + 8, p + 16,
// ...; all start at +0; what is not there adds nothing. The eight meet in one fixed tree. The order
// depends on the format and on K alone.
#pragma once

#include "baracuda/formats.h"
#include "baracuda/numeric.h"

namespace bcy {

constexpr int kGroup = 32;
constexpr int kUnit = 256;
constexpr int kPartials = 8;
constexpr int kUnitGroups = kUnit / kGroup;
constexpr int kChunk = 64;
constexpr int kUnitChunks = kUnit / kChunk;

// Of a row; the last may be short.
BCY_INLINE constexpr int64_t unit_count(int64_t ncols) { return (ncols + kUnit - 1) / kUnit; }

// ---- float activations to integers ------------------------------------------------------------------------------

// How one token's group becomes integers: x becomes rint(x * inverse), clipped to what they hold.
struct GroupScale {
  float scale;  // d_a; NaN when the group holds a NaN or an infinity
  float inverse;  // 0 when every code is 0
};

// To 8 bits, which is called staging.

BCY_INLINE GroupScale group_scale(float largest_magnitude, bool all_finite) {
  if (!all_finite) return {as_float(0x7fc00000u), 0.0f};
  if (largest_magnitude < 1e-36f) return {0.0f, 0.0f};
  return {div(largest_magnitude, 127.0f), div(127.0f, largest_magnitude)};
}

BCY_INLINE int stage_element(float x, GroupScale group) {
  // inverse 0 is tested, not multiplied: 0 times an infinity is NaN, whose conversion to an integer
  // is undefined.
  if (group.inverse == 0.0f) return 0;
  const float u = round_to_even(mul(x, group.inverse));
  return int(u < -127.0f ? -127.0f : u > 127.0f ? 127.0f : u);
}

// To a sign and Bits bits, by a power of two: what has few bits, as float16 has, stays exact unless
// it is far below the largest.
template <int Bits>
BCY_INLINE GroupScale binary_scale(float largest_magnitude, bool all_finite) {
  if (!all_finite) return {as_float(0x7fc00000u), 0.0f};
  uint32_t exponent = as_bits(largest_magnitude) >> 23;
  if (exponent < 23) exponent = 23;  // below 2^-104: both factors stay normal
  constexpr int kShift = Bits - 1;
  return {as_float((exponent - kShift) << 23), as_float((254 + kShift - exponent) << 23)};
}

// To 24 bits, which is called fine, for products of float activations.
constexpr int kFineBits = 23;  // of a magnitude
BCY_INLINE int fine_element(float x, GroupScale group) {
  if (group.inverse == 0.0f) return 0;
  const int code = int(round_to_even(mul(x, group.inverse)));  // at most 2^23
  return code < 0x7fffff ? code : 0x7fffff;
}

// What a minimum multiplies: the sum of its elements.
BCY_INLINE float staged_sum(GroupScale group, int sum) { return mul(group.scale, float(sum)); }

// Where minima are integers, the staged sums of a unit become integers of 14 bits too, each x
// rint(x * inverse), so that products with minima are added as integers.
constexpr int kSumBits = 13;  // of a magnitude

BCY_INLINE int sum_to_integer(float sum, GroupScale unit) {
  if (unit.inverse == 0.0f) return 0;
  return int(round_to_even(mul(sum, unit.inverse)));  // at most 2^kSumBits
}

// In two parts, both signed bytes: sum = 2^kLowSumBits * high + low.
constexpr int kLowSumBits = 7;
BCY_INLINE int low_of_sum(int sum) { return sum & ((1 << kLowSumBits) - 1); }
BCY_INLINE int high_of_sum(int sum) { return sum >> kLowSumBits; }

// ---- products of integers, group after group --------------------------------------------------------------------

// +0 of a number, NaN of an infinity.
BCY_INLINE float zero_or_nan(float x) { return fma(x, 0.0f, 0.0f); }
BCY_INLINE float finite_or_nan(float x) { return add(x, zero_or_nan(x)); }

// An integer below 2^24 times a scale of the weight that is finite_or_nan, rounded once; a zero is
// +0.
BCY_INLINE float scaled(float integer, float scale) { return fma(integer, scale, 0.0f); }

// One group joins its partial sum. dot is the exact integer sum of code * u, halves already
// weighted.
BCY_INLINE float add_group(float partial, float dot, float scale, float group_scale) {
  return fma(scaled(dot, finite_or_nan(scale)), group_scale, partial);
}

// The same of fine integers: dot is their sum, rounded to float32; halves with scales of their own
// join one after the other.
BCY_INLINE float add_fine_group(float partial, float dot, float scale, float group_scale) {
  return fma(dot, mul(scale, group_scale), partial);
}

// A float minimum joins right after its group; with one for each half, the first half's first.
BCY_INLINE float add_minimum(float partial, float minimum, float staged_sum) {
  return fma(minimum, staged_sum, partial);
}

// The integer minima of a unit join after its groups. dot is the exact integer sum of minimum *
// sum_to_integer.
BCY_INLINE float add_unit_minima(float partial, float dot, float scale, float sums_scale) {
  return fma(scaled(dot, finite_or_nan(scale)), sums_scale, partial);
}

BCY_INLINE float meet(const float (&p)[kPartials]) {
  return add(add(add(p[0], p[4]), add(p[2], p[6])), add(add(p[1], p[5]), add(p[3], p[7])));
}

// ---- float products of 4-bit codes ------------------------------------------------------------------------------
//
// A chunk is 64 elements of a row. Where all that there are have one scale, the value of an element
// is its code's, and the scale multiplies the chunk's sum; else the value is that times the
// element's scale, and 1 multiplies the sum. What is not there is +0.
//
// Elements 2 j and 2 j + 1 are a pair: fma(value, x, value * x), the second's product onto the
// first's. The pairs of a word, 8 elements, meet as (0 + 1) + (2 + 3), the words of a chunk as the
// eight above, the chunks of a unit, scaled, as (0 + 2) + (1 + 3). Partial sum p takes units p,
// p + 8, ...; the eight meet as above.
//
// A pair is a function of two activations and a byte, and a scale multiplies once in 64 elements:
// so pairs can be looked up.

BCY_INLINE float add_pair(const float* values, const float* x) {
  return fma(values[1], x[1], mul(values[0], x[0]));
}
BCY_INLINE float add_word(const float* values, const float* x) {
  return add(add(add_pair(values, x), add_pair(values + 2, x + 2)),
             add(add_pair(values + 4, x + 4), add_pair(values + 6, x + 6)));
}
BCY_INLINE float meet_chunks(const float* sums) {
  return add(add(sums[0], sums[2]), add(sums[1], sums[3]));
}

}  // namespace bcy
