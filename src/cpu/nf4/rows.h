// SPDX-License-Identifier: Apache-2.0
// Rows of weights, for any instruction set V, whose floats are those of cpu/vectors_*.h and which
// has besides
//
//   Table                          16 floats, by code
//   load_table(values), scale(table, factor)
//   look_up<shift>(table, words)   entry of the four bits from `shift` on of every dword
//   widen(p)                       kWidth bytes
//   widen_to_join(p)               kWidth bytes in the order that join wants
//   join(even, odd, out)           two vectors, those of even and of odd elements, to two in order
//   load_words(p)                  4 * kWidth bytes
//   eights(v)                      as kWidth / 8 vectors of eight
#pragma once

#include "cpu/nf4/plain.h"
#include "cpu/units.h"

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

  BCY_INLINE void dequantize(int64_t row, int64_t unit, int groups, Floats* values) const {
    if (!regular) return dequantize_any(row, unit, groups, values);
    float scales[kUnitGroups];
    _mm256_storeu_ps(scales, load_scales((row * weight.ncols + unit * kUnit) / kGroup, groups));
    if (!pairs) {
      dequantize_bytes(at(row, unit), scales, groups, values);
    } else if (row % 2 == 0) {
      dequantize_pairs<0>(at(row, unit), scales, groups, values);
    } else {
      dequantize_pairs<4>(at(row, unit), scales, groups, values);
    }
  }

  // Groups are of one scale each: units can be had as codes.
  BCY_INLINE bool has_units() const { return regular; }

  // The unit of a row as 128 bytes of codes in the bitsandbytes layout, in place or in `packed`.
  // What is not there has any code: times +0 its value is a zero, which changes no sum but for the
  // sign of a zero, and partial sums, which start at +0, lose that.
  BCY_INLINE const uint8_t* codes_of(int64_t row, int64_t unit, int elements,
                                     uint8_t* packed) const {
    const uint8_t* const from = at(row, unit);
    if (!pairs && elements == kUnit) return from;
    if (!pairs) {
      memset(packed, 0, kUnit / 2);
      memcpy(packed, from, elements / 2);
    } else if (elements == kUnit) {
      for (int i = 0; i < kUnit; i += 64) pack_row(from + i, row % 2 != 0, packed + i / 2);
    } else {
      uint8_t filled_up[kUnit] = {};
      memcpy(filled_up, from, elements);
      for (int i = 0; i < kUnit; i += 64) pack_row(filled_up + i, row % 2 != 0, packed + i / 2);
    }
    return packed;
  }

  // The scales of a unit's chunks; where the two groups of some differ, their chunks have 1 and
  // `factors` what each word's values are multiplied by first. What is not there has 1.
  BCY_INLINE bool scales_of(int64_t row, int64_t unit, int elements, float* scales,
                            float* factors) const {
    const int groups = elements / kGroup;
    const int64_t first = (row * weight.ncols + unit * kUnit) / kGroup;
    const __m256 loaded = load_scales(first, groups);
    if (groups == kUnitGroups) {
      const __m256i bits = _mm256_castps_si256(loaded);
      const __m256i same = _mm256_cmpeq_epi32(bits, _mm256_shuffle_epi32(bits, 0xb1));
      if (_mm256_movemask_epi8(same) == -1) {
        const __m256i even = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
        _mm_storeu_ps(scales, _mm256_castps256_ps128(_mm256_permutevar8x32_ps(loaded, even)));
        return false;
      }
    }
    float of_groups[kUnitGroups];
    _mm256_storeu_ps(of_groups, loaded);
    bool differ = false;
    for (int c = 0; c < kUnitChunks; ++c) {
      const float* const two = of_groups + 2 * c;
      const bool other = 2 * c + 1 < groups && as_bits(two[0]) != as_bits(two[1]);
      scales[c] = 2 * c < groups && !other ? two[0] : 1.0f;
      for (int i = 0; i < 8; ++i) factors[c * 8 + i] = other ? two[i / 4] : 1.0f;
      differ |= other;
    }
    return differ;
  }

  BCY_INLINE void prefetch(int64_t row, int64_t unit) const { prefetch(at(row, unit)); }

 private:
  // One row of 64 bytes in which two have their codes.
  static BCY_INLINE void pack_row(const uint8_t* from, bool odd, uint8_t* to) {
    const auto pack = [&](int i) {
      const __m256i two = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
      const __m256i first = odd ? two : _mm256_slli_epi16(two, 4);
      const __m256i second = _mm256_srli_epi16(two, odd ? 12 : 8);
      return _mm256_or_si256(_mm256_and_si256(first, _mm256_set1_epi16(0xf0)),
                             _mm256_and_si256(second, _mm256_set1_epi16(0x0f)));
    };
    const __m256i packed = _mm256_packus_epi16(pack(0), pack(32));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0xd8));
  }

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
  BCY_INLINE __m256 load_scales(int64_t first, int groups) const {
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
    return _mm256_permutevar8x32_ps(_mm256_maskload_ps(absmax, exist), block);
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
    memcpy(values, plain, groups * kVectors * sizeof(Floats));
  }
};

}  // namespace
}  // namespace bcy::cpu::nf4
