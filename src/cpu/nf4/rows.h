// SPDX-License-Identifier: Apache-2.0
// Rows of weights for float_product.h, for any instruction set V, which has besides
//
//   Table                          16 floats, by code
//   load_table(values), scale(table, factor)
//   look_up<shift>(table, words)   entry of the four bits from `shift` on of every dword
//   widen(p)                       kWidth bytes
//   widen_to_join(p)               kWidth bytes in the order that join wants
//   split(in, even, odd)           two vectors to those of even and of odd elements, in that order
//   join(even, odd, out)           the way back
#pragma once

#include "cpu/float_product.h"
#include "cpu/nf4/plain.h"

namespace bcy::cpu::nf4 {
namespace {

template <class V>
class Rows {
  using Floats = typename V::Floats;
  static constexpr int kVectors = kGroup / V::kWidth;

  const bcy_nf4_weight& weight;
  const float* const codebook;
  const uint8_t* const codes;
  const bool pairs;
  // Groups neither cross blocks nor the ends of rows, and blocks are 2^shift of them.
  bool regular;
  int shift = 0;

 public:
  explicit Rows(const bcy_nf4_weight& matrix)
      : weight(matrix),
        codebook(codebook_of(matrix.codebook)->values),
        codes(static_cast<const uint8_t*>(matrix.codes)),
        pairs(matrix.layout == BCY_ROW_PAIR) {
    const int groups = weight.block_size / kGroup;
    regular = weight.ncols % kGroup == 0 && weight.block_size % kGroup == 0 &&
              (groups & (groups - 1)) == 0;
    if (regular) shift = __builtin_ctz(unsigned(groups));
  }

  BCY_INLINE void prefetch(int64_t row, int64_t unit) const { prefetch(at(row, unit)); }

  BCY_INLINE void dequantize(int64_t row, int64_t unit, int groups, Floats* values) const {
    if (!regular) return dequantize_any(row, unit, groups, values);
    float scales[kUnitGroups];
    load_scales((row * weight.ncols + unit * kUnit) / kGroup, groups, scales);
    if (!pairs) {
      dequantize_bytes(at(row, unit), scales, groups, values);
    } else if (row % 2 == 0) {
      dequantize_pairs<0>(at(row, unit), scales, groups, values);
    } else {
      dequantize_pairs<4>(at(row, unit), scales, groups, values);
    }
  }

  // Products with few tokens are faster when no values are stored in between.
  BCY_INLINE bool multiplies() const { return regular; }

  template <int kRows, int kTokens, class Element>
  BCY_INLINE void multiply(int64_t row, int64_t end, int64_t partial, const Units& units,
                           const typename Element::Storage* const* x,
                           Floats (*sums)[kRows][kVectors]) const {
    const int64_t last = end - (pairs ? 2 : 1);
    const uint8_t* first[kRows];
    int64_t first_group[kRows];
    for (int r = 0; r < kRows; ++r) {
      const int64_t even = row + (pairs ? r & ~1 : r);
      const int64_t i = (even < last ? even : last) + (pairs ? r & 1 : 0);
      first[r] = at(i, 0);
      first_group[r] = i * weight.ncols / kGroup;
    }
    const int unit_bytes = pairs ? kUnit : kUnit / 2;
    const int64_t next_rows = at(kRows, 0) - at(0, 0);
    const auto table = V::load_table(codebook);
    Floats kept[kTokens][kRows][kVectors] = {};
    for (int64_t unit = partial; unit < units.count; unit += kPartials) {
      const int groups = units.groups(unit);
      const int64_t ahead = next_rows + unit * unit_bytes;
      const uint8_t* p[kRows];
      float scales[kRows][kUnitGroups];
      for (int r = 0; r < kRows; ++r) {
        p[r] = first[r] + unit * unit_bytes;
        prefetch(first[r] + ahead);
        load_scales(first_group[r] + unit * kUnitGroups, groups, scales[r]);
      }
      const typename Element::Storage* from[kTokens];
      for (int t = 0; t < kTokens; ++t) from[t] = x[t] + unit * kUnit;
      if (pairs) {
        multiply_pairs<Element>(p, scales, table, groups, from, kept);
      } else {
        multiply_bytes<Element>(p, scales, table, groups, from, kept);
      }
    }
    for (int t = 0; t < kTokens; ++t) {
      for (int r = 0; r < kRows; ++r) {
        for (int i = 0; i < kVectors; i += 2) {
          if (pairs) {
            sums[t][r][i] = kept[t][r][i];
            sums[t][r][i + 1] = kept[t][r][i + 1];
          } else {
            V::join(kept[t][r][i], kept[t][r][i + 1], sums[t][r] + i);
          }
        }
      }
    }
  }

 private:
  // The first byte of a unit, where one begins there.
  BCY_INLINE const uint8_t* at(int64_t row, int64_t unit) const {
    return codes + (pairs ? row / 2 * weight.ncols + unit * kUnit
                          : (row * weight.ncols + unit * kUnit) / 2);
  }

  BCY_INLINE void prefetch(const uint8_t* unit) const {
    for (int line = 0; line < (pairs ? kUnit : kUnit / 2); line += 64) {
      __builtin_prefetch(unit + line);
    }
  }

  // absmax of each of some groups, from group `first` of the matrix on
  BCY_INLINE void load_scales(int64_t first, int groups, float* scales) const {
    const int ahead = int(first & ((int64_t(1) << shift) - 1));  // in the same block
    const int blocks = ((ahead + groups - 1) >> shift) + 1;
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i exist = _mm256_cmpgt_epi32(_mm256_set1_epi32(blocks), lanes);
    const __m256i block = _mm256_srl_epi32(_mm256_add_epi32(_mm256_set1_epi32(ahead), lanes),
                                           _mm_cvtsi32_si128(shift));
    const float* absmax = static_cast<const float*>(weight.absmax) + (first >> shift);
    float decoded[kUnitGroups];
    if (weight.nested_absmax) {
      decode_absmax(first >> shift, blocks, decoded);
      absmax = decoded;
    }
    _mm256_storeu_ps(scales, _mm256_permutevar8x32_ps(_mm256_maskload_ps(absmax, exist), block));
  }
  __attribute__((noinline)) void decode_absmax(int64_t first, int blocks, float* absmax) const {
    const auto* const quantized = static_cast<const uint8_t*>(weight.absmax) + first;
    int64_t nested = first / weight.nested_block;
    int64_t left = weight.nested_block - first % weight.nested_block;
    for (int i = 0; i < blocks; ++i, --left) {
      if (left == 0) {
        ++nested;
        left = weight.nested_block;
      }
      absmax[i] = add(mul(weight.nested_code[quantized[i]], weight.nested_absmax[nested]),
                      weight.nested_offset);
    }
  }

  template <class Element, class Table, int kRows, int kTokens>
  static BCY_INLINE void multiply_bytes(const uint8_t* const (&p)[kRows],
                                        const float (&scales)[kRows][kUnitGroups],
                                        const Table& table, int groups,
                                        const typename Element::Storage* const (&x)[kTokens],
                                        Floats (&sums)[kTokens][kRows][kVectors]) {
    for (int g = 0; g < groups; ++g) {
      Floats a[kTokens][kVectors];
      for (int t = 0; t < kTokens; ++t) {
        for (int i = 0; i < kVectors; i += 2) {
          const auto* const from = x[t] + g * kGroup + i * V::kWidth;
          const Floats in[2] = {V::load(Element{}, from), V::load(Element{}, from + V::kWidth)};
          V::split(in, a[t] + i, a[t] + i + 1);
        }
      }
      for (int r = 0; r < kRows; ++r) {
        const Table scaled = V::scale(table, V::splat(scales[r][g]));
        for (int i = 0; i < kVectors; i += 2) {
          const auto bytes = V::widen_to_join(p[r] + g * (kGroup / 2) + i / 2 * V::kWidth);
          const Floats even = V::template look_up<4>(scaled, bytes);
          const Floats odd = V::template look_up<0>(scaled, bytes);
          for (int t = 0; t < kTokens; ++t) {
            sums[t][r][i] = V::fma(even, a[t][i], sums[t][r][i]);
            sums[t][r][i + 1] = V::fma(odd, a[t][i + 1], sums[t][r][i + 1]);
          }
        }
      }
    }
  }
  template <class Element, class Table, int kRows, int kTokens>
  static BCY_INLINE void multiply_pairs(const uint8_t* const (&p)[kRows],
                                        const float (&scales)[kRows][kUnitGroups],
                                        const Table& table, int groups,
                                        const typename Element::Storage* const (&x)[kTokens],
                                        Floats (&sums)[kTokens][kRows][kVectors]) {
    for (int g = 0; g < groups; ++g) {
      Floats a[kTokens][kVectors];
      for (int t = 0; t < kTokens; ++t) {
        for (int i = 0; i < kVectors; ++i) {
          a[t][i] = V::load(Element{}, x[t] + g * kGroup + i * V::kWidth);
        }
      }
      for (int r = 0; r < kRows; r += 2) {
        const Table low = V::scale(table, V::splat(scales[r][g]));
        const Table high = V::scale(table, V::splat(scales[r + 1][g]));
        for (int i = 0; i < kVectors; ++i) {
          const auto bytes = V::widen(p[r] + g * kGroup + i * V::kWidth);
          const Floats even_row = V::template look_up<0>(low, bytes);
          const Floats odd_row = V::template look_up<4>(high, bytes);
          for (int t = 0; t < kTokens; ++t) {
            sums[t][r][i] = V::fma(even_row, a[t][i], sums[t][r][i]);
            sums[t][r + 1][i] = V::fma(odd_row, a[t][i], sums[t][r + 1][i]);
          }
        }
      }
    }
  }

  BCY_INLINE void dequantize_bytes(const uint8_t* p, const float* scales, int groups,
                                   Floats* values) const {
    const auto table = V::load_table(codebook);
    for (int g = 0; g < groups; ++g) {
      const auto scaled = V::scale(table, V::splat(scales[g]));
      for (int i = 0; i < kVectors; i += 2, p += V::kWidth, values += 2) {
        const auto bytes = V::widen_to_join(p);
        V::join(V::template look_up<4>(scaled, bytes), V::template look_up<0>(scaled, bytes),
                values);
      }
    }
  }
  template <int kShift>
  BCY_INLINE void dequantize_pairs(const uint8_t* p, const float* scales, int groups,
                                   Floats* values) const {
    const auto table = V::load_table(codebook);
    for (int g = 0; g < groups; ++g) {
      const auto scaled = V::scale(table, V::splat(scales[g]));
      for (int i = 0; i < kVectors; ++i, p += V::kWidth, ++values) {
        *values = V::template look_up<kShift>(scaled, V::widen(p));
      }
    }
  }

  // What starts inside a byte, or holds ends of blocks or of rows inside a group.
  __attribute__((noinline)) void dequantize_any(int64_t row, int64_t unit, int groups,
                                                Floats* values) const {
    const int64_t first = row * weight.ncols + unit * kUnit;
    const int count = Units(weight.ncols).elements(unit);
    uint8_t packed[kUnit] = {};
    if (pairs) {
      memcpy(packed, at(row, unit), count);
    } else if (first % 2 == 0) {
      memcpy(packed, codes + first / 2, (count + 1) / 2);
    } else {
      const uint8_t* const p = codes + first / 2;
      for (int i = 0; i < count / 2; ++i) packed[i] = uint8_t(p[i] << 4 | p[i + 1] >> 4);
      if (count % 2 != 0) packed[count / 2] = uint8_t(p[count / 2] << 4);
    }
    constexpr float kOnes[kUnitGroups] = {1, 1, 1, 1, 1, 1, 1, 1};
    if (!pairs) {
      dequantize_bytes(packed, kOnes, groups, values);
    } else if (row % 2 == 0) {
      dequantize_pairs<0>(packed, kOnes, groups, values);
    } else {
      dequantize_pairs<4>(packed, kOnes, groups, values);
    }
    alignas(64) float plain[kUnit];
    memcpy(plain, values, groups * kVectors * sizeof(Floats));
    scale_plainly(weight, first, count, plain);
    for (int i = count; i < groups * kGroup; ++i) plain[i] = -0.0f;
    memcpy(values, plain, groups * kVectors * sizeof(Floats));
  }
};

template <class V>
struct Vectorized {
  static void matmul(const bcy_nf4_matmul_args& args, int64_t begin, int64_t end) {
    const Rows<V> rows(args.weight);
    FloatProduct<V, bcy_nf4_matmul_args, Rows<V>>(args, rows, args.weight.ncols)
        .multiply(begin, end);
  }

  static void dequantize(const bcy_nf4_dequantize_args& args, int64_t begin, int64_t end) {
    const Rows<V> rows(args.weight);
    const Units units(args.weight.ncols);
    with_element(args.y_type, [&](auto element) {
      using Element = decltype(element);
      for (int64_t row = begin; row < end; ++row) {
        auto* y = static_cast<typename Element::Storage*>(args.y) + row * args.y_stride;
        for (int64_t unit = 0; unit < units.count; ++unit, y += kUnit) {
          constexpr int kVectors = kGroup / V::kWidth;
          typename V::Floats values[kUnitGroups * kVectors];
          rows.dequantize(row, unit, units.groups(unit), values);
          const int count = units.elements(unit);
          int i = 0;
          for (; i + V::kWidth <= count; i += V::kWidth) {
            V::store(Element{}, y + i, values[i / V::kWidth]);
          }
          if (i < count) {
            typename Element::Storage rest[V::kWidth];
            V::store(Element{}, rest, values[i / V::kWidth]);
            memcpy(y + i, rest, (count - i) * sizeof *y);
          }
        }
      }
    });
  }

  static constexpr Kernels kKernels = {matmul, dequantize, Plain::quantize};
};

}  // namespace
}  // namespace bcy::cpu::nf4
