// SPDX-License-Identifier: Apache-2.0
// The codes of a group of rows as tensor cores take them.
#pragma once

#include "baracuda/formats.h"

namespace bcy {

// Whether codes times the scales of their halves fit a byte as unsigned ones, or negated. The
// latter take more instructions, which pay for many tokens, more than eight.
template <class Format>
constexpr bool scales_unsigned_codes = scales_fit_codes<Format> && Format::kUnsignedCodes;
template <class Format>
constexpr bool negates_scaled_codes = scales_fit_codes<Format> && !Format::kUnsignedCodes;

template <class Format, bool ManyTokens>
constexpr bool scales_codes =
    scales_unsigned_codes<Format> || (ManyTokens && negates_scaled_codes<Format>);

// Whether a group's halves are multiplied one by one, as each has a scale of its own.
template <class Format, bool ManyTokens = true>
constexpr bool multiplies_halves =
    Format::kScaleElements == 16 && !scales_codes<Format, ManyTokens>;

// Whether integers scale their sums, as what comes of it fits sum_start: code times scale is at
// most 128 and the factor at most 4, so 32 of them times 128 are at most 2^21.
template <class Format, bool ManyTokens>
constexpr bool scales_half_sums =
    multiplies_halves<Format, ManyTokens> && negates_scaled_codes<Format>;

// Operands carry a factor 2^operand_shift. Of two groups that a word has in the same half of its
// bytes, which it takes one instruction to move, the second may keep its place.
template <class Format, bool ManyTokens>
BCY_INLINE constexpr int operand_shift(int g) {
  if (scales_unsigned_codes<Format> || scales_half_sums<Format, ManyTokens>) return 2 * (g % 2);
  return scales_codes<Format, ManyTokens> ? 0 : Format::shift(g);
}

// What scales the products of operands of group g.
template <class Format, bool ManyTokens, class Block>
BCY_INLINE float operand_scale(Block block, int g) {
  const float scale = Format::scale(block, g);
  return ManyTokens && negates_scaled_codes<Format> ? -scale : scale;
}

// Whether scales times 1.5 * 2^23 are exact in float32.
template <class Format>
constexpr bool scales_are_short = true;
template <>
inline constexpr bool scales_are_short<Q8_K> = false;  // a float32
template <>
inline constexpr bool scales_are_short<MXFP4> = false;  // up to 2^127

// Whether they are finite whatever their bytes.
template <class Format>
constexpr bool scales_are_finite = std::is_same_v<Format, MXFP4>;

// Where sums of integers start that end up in the low mantissa bits of 1.5 * 2^(23 - shift), where
// every sum of a group fits.
BCY_INLINE constexpr uint32_t sum_start(int shift) { return 0x4b400000u - (uint32_t(shift) << 23); }

// A scale of the weight, or of what it is made of, for such sums.
template <class Format>
class SumScale {
 public:
  SumScale() = default;
  BCY_INLINE SumScale(float scale, int shift) {
    const float start = as_float(sum_start(shift));
    constexpr bool kAsItIs = scales_are_short<Format> || scales_are_finite<Format>;
    scale_ = kAsItIs ? scale : finite_or_nan(scale);
    offset_ = scales_are_short<Format> ? mul(scale, -start) : -start;
  }
  // scaled(sum, scale)
  BCY_INLINE float times(int sum) const {
    const float in_mantissa = as_float(uint32_t(sum));
    return scales_are_short<Format> ? fma(in_mantissa, scale_, offset_)
                                    : scaled(add(in_mantissa, offset_), scale_);
  }

 private:
  float scale_, offset_;
};

// What is added to unsigned codes.
template <class Format>
constexpr int code_offset = Format::kUnsignedCodes ? 0 : -(128 >> Format::shift(0));

// half_scale or its negative, with the offset of four bytes taken off at once: 128 is added, too,
// so that none borrows from the next, and taken off by flipping the top bit.
template <class Format, bool Negative = false, class Block>
__device__ __forceinline__ int signed_half_scale(Block block, int g, int half) {
  static_assert(Format::kHalfOffset < 128, "what is added to a byte would not fit it");
  const uint32_t scales = Format::half_scales(block, g);
  const uint32_t moved = Negative ? (128 + Format::kHalfOffset) * 0x01010101u - scales
                                  : (128 - Format::kHalfOffset) * 0x01010101u + scales;
  return int(permute_or_fill(moved ^ 0x80808080u, 0, 0x8880 + 0x1111 * (2 * (g % 2) + half)));
}

// The codes of a word times the scale of its half.
template <class Format, class Block>
__device__ __forceinline__ uint32_t scaled_codes(Block block, int g, int half, int t) {
  const uint32_t codes = Format::unsigned_codes(block, g, half, t, operand_shift<Format, true>(g));
  if constexpr (Format::kUnsignedCodes) {
    return codes * uint32_t(half_scale<Format>(block, g, half));
  } else {
    // Four bytes at once, as above.
    const uint32_t scale = signed_half_scale<Format, true>(block, g, half);
    constexpr uint32_t kOffsets = uint32_t(code_offset<Format>) * 0x01010101u;
    const uint32_t offset = multiply_add(scale, kOffsets, 0x80808080u);
    return (codes * scale + offset) ^ 0x80808080u;
  }
}

// What codes are looked up in, of formats that have a table. As two addends, whose products are
// added, that takes fewer instructions, but twice as many products.
template <class Format, int Addends>
__device__ __forceinline__ Table16 operand_table() {
  if constexpr (gives_turns<Format>) {
    return Addends == 2 ? in_registers(in_two_addends(Format::table())) : Format::table();
  }
  return {};
}

// Group g of two rows, as mma_group wants it: codes, or codes times scales.
template <class Format, bool ManyTokens, class Block, int Addends>
__device__ __forceinline__ void load_operands(Block upper, Block lower, int g,
                                              [[maybe_unused]] const Table16& table,
                                              uint32_t (&addends)[Addends][4]) {
  const int t = threadIdx.x % 4;
  auto& a = addends[0];
  if constexpr (gives_turns<Format>) {
    const Block rows[2] = {upper, lower};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t nibbles = Format::nibbles(rows[i], g, t);
      if constexpr (Addends == 2) {
        const TurnsInAddends turns = look_up_in_addends(table, nibbles);
        a[i] = turns.first.x;
        a[i + 2] = turns.first.y;
        addends[1][i] = turns.second.x;
        addends[1][i + 2] = turns.second.y;
      } else {
        const uint2 turns = look_up_by_turns(table, nibbles);
        a[i] = turns.x;
        a[i + 2] = turns.y;
      }
    }
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if constexpr (scales_codes<Format, ManyTokens>) {
        a[2 * half] = scaled_codes<Format>(upper, g, half, t);
        a[2 * half + 1] = scaled_codes<Format>(lower, g, half, t);
      } else if constexpr (scales_half_sums<Format, ManyTokens>) {
        const int shift = operand_shift<Format, ManyTokens>(g);
        a[2 * half] = Format::unsigned_codes(upper, g, half, t, shift);
        a[2 * half + 1] = Format::unsigned_codes(lower, g, half, t, shift);
      } else {
        a[2 * half] = Format::codes(upper, g, half, t);
        a[2 * half + 1] = Format::codes(lower, g, half, t);
      }
    }
  }
}

// The same of many tokens without the factor. What codes lack is an addend of its own, which takes
// fewer instructions than to subtract it from each.
template <class Format>
constexpr int operand_offset = operand_shift<Format, true>(0) > 0 ? code_offset<Format> : 0;
template <class Format>
constexpr int plain_addends = gives_turns<Format> || operand_offset<Format> != 0 ? 2 : 1;

template <class Format, class Block>
__device__ __forceinline__ void load_plain_operands(Block upper, Block lower, int g,
                                                    const Table16& table,
                                                    uint32_t (&addends)[plain_addends<Format>][4]) {
  if constexpr (operand_offset<Format> != 0) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      addends[0][2 * half] = Format::template codes<false>(upper, g, half, t) >> Format::shift(g);
      addends[0][2 * half + 1] =
          Format::template codes<false>(lower, g, half, t) >> Format::shift(g);
    }
#pragma unroll
    for (uint32_t& offsets : addends[1]) offsets = uint8_t(operand_offset<Format>) * 0x01010101u;
  } else {
    load_operands<Format, true>(upper, lower, g, table, addends);
    // Unsigned codes, whose lower bits are zero.
#pragma unroll
    for (uint32_t& codes : addends[0]) codes >>= operand_shift<Format, true>(g);
  }
}

}  // namespace bcy
