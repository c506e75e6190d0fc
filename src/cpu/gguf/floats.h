// SPDX-License-Identifier: Apache-2.0
// Dequantization, and the product with float activations, for any instruction set V (see products.h
// and staging.h), which has besides
//
//   splat(value)
//   widen<i, is_unsigned>(codes)   vector i of the 32 codes of a group, as Floats
//   store(Element, y, floats)      rounded, with one NaN for all
#pragma once

#include <immintrin.h>

#include "cpu/gguf/layout.h"

namespace bcy::cpu {
namespace {

// The 32 codes of a group in their order: what Format::codes gives word by word.
typedef uint32_t Words8 __attribute__((vector_size(32)));
typedef uint32_t Words4 __attribute__((vector_size(16)));

template <class T>
BCY_INLINE T load_bytes(const uint8_t* p) {
  T value;
  memcpy(&value, p, sizeof value);
  return value;
}
BCY_INLINE Words8
nibbles_at(const uint8_t* p) {  // element j in the low nibble of p[j], j + 16 in the high one
  const Words4 packed = load_bytes<Words4>(p);
  return Words8{packed[0],      packed[1],      packed[2],      packed[3],
                packed[0] >> 4, packed[1] >> 4, packed[2] >> 4, packed[3] >> 4} &
         0x0f0f0f0fu;
}
BCY_INLINE Words8 spread_bits_of(uint32_t bits) {
  const Words8 fours =
      Words8{bits, bits, bits, bits, bits, bits, bits, bits} >> Words8{0, 4, 8, 12, 16, 20, 24, 28};
  return (fours & 15u) * 0x00204081u & 0x01010101u;
}
BCY_INLINE Words8 look_up(const Table16& table, Words8 nibbles) {
  const __m256i entries = _mm256_broadcastsi128_si256(load_bytes<__m128i>((const uint8_t*)&table));
  return (Words8)_mm256_shuffle_epi8(entries, (__m256i)nibbles);
}

template <class Format>
BCY_INLINE Words8 group_codes(const uint8_t* block, int group) {
  if constexpr (std::is_same_v<Format, Q4_0>) {
    return nibbles_at(block + 2) << 4 ^ 0x80808080u;
  } else if constexpr (std::is_same_v<Format, Q4_1>) {
    return nibbles_at(block + 4);
  } else if constexpr (std::is_same_v<Format, Q5_0>) {
    return nibbles_at(block + 6) | (spread_bits_of(load32<2>(block + 2)) ^ 0x01010101u) * 0xf0u;
  } else if constexpr (std::is_same_v<Format, Q5_1>) {
    return nibbles_at(block + 8) | spread_bits_of(load32<2>(block + 4)) << 4;
  } else if constexpr (std::is_same_v<Format, IQ4_NL>) {
    return look_up(iq4_table(), nibbles_at(block + 2));
  } else if constexpr (std::is_same_v<Format, IQ4_XS>) {
    return look_up(iq4_table(), nibbles_at(block + 8 + 16 * group));
  } else if constexpr (std::is_same_v<Format, MXFP4>) {
    return look_up(e2m1_table(), nibbles_at(block + 1));
  } else {
    // Word operations on 32 bytes in a row: the compiler makes vectors of them.
    uint32_t words[8];
    for (int word = 0; word < 8; ++word) words[word] = Format::codes(block, group, word);
    Words8 codes;
    memcpy(&codes, words, sizeof codes);
    return codes;
  }
}

template <class V, class Format>
struct FloatPath {
  using Floats = typename V::Floats;
  using L = Layout<Format>;
  static constexpr int kVectors = kGroup / V::kWidth;

  template <int i = 0>
  static BCY_INLINE void dequantize_vectors(const uint8_t* block, int group, float scale,
                                            Words8 codes, Floats* values) {
    if constexpr (i < kVectors) {
      constexpr int half = i * V::kWidth / 16;
      float w = scale;
      if constexpr (L::kHalves == 2) w = mul(w, float(Format::half_scale(block, group, half)));
      const Floats code = V::template widen<i, Format::kUnsignedCodes>(codes);
      if constexpr (Format::kMinima == 0) {
        values[i] = code * w;
      } else {
        const float minimum = Format::minimum(block, group, Format::kMinima == 2 ? half : 0);
        values[i] = V::fma(V::splat(w), code, V::splat(minimum));
      }
      dequantize_vectors<i + 1>(block, group, scale, codes, values);
    }
  }
  static BCY_INLINE void dequantize_group(const uint8_t* block, int group, Floats* values) {
    dequantize_vectors(block, group, Format::scale(block, group), group_codes<Format>(block, group),
                       values);
  }

  // Elements k .. k + 32 count of a row; returns nothing less than whole groups.
  static BCY_INLINE void dequantize_groups(const uint8_t* row, int64_t k, int count,
                                           Floats* values) {
    for (int i = 0; i < count; ++i, k += kGroup, values += kVectors) {
      dequantize_group(row + k / Format::kElements * Format::kBytes,
                       int(k % Format::kElements / kGroup), values);
    }
  }

  static void dequantize(const bcy_gguf_dequantize_args& args, int64_t begin, int64_t end) {
    const int64_t stride = row_bytes<Format>(args.ncols);
    with_element(args.y_type, [&](auto element) {
      using Element = decltype(element);
      for (int64_t row = begin; row < end; ++row) {
        const uint8_t* const weight = static_cast<const uint8_t*>(args.weight) + row * stride;
        auto* const y = static_cast<typename Element::Storage*>(args.y) + row * args.y_stride;
        for (int64_t k = 0; k < args.ncols; k += kGroup) {
          Floats values[kVectors];
          dequantize_groups(weight, k, 1, values);
          for (int i = 0; i < kVectors; ++i) V::store(Element{}, y + k + i * V::kWidth, values[i]);
        }
      }
    });
  }

  struct Sums {
    Floats partials[kPartials][kVectors];
  };

  template <class Element>
  static void multiply_row(const bcy_gguf_matmul_args& args, int64_t row, int64_t first,
                           int tokens) {
    const uint8_t* const weight =
        static_cast<const uint8_t*>(args.weight) + row * row_bytes<Format>(args.ncols);
    const auto* const x =
        static_cast<const typename Element::Storage*>(args.x) + first * args.x_stride;
    Sums sums[kTokenTile];
    for (int t = 0; t < tokens; ++t) sums[t] = Sums{};
    for (int64_t k = 0; k < args.ncols; k += kUnit) {
      const int64_t left = (args.ncols - k) / kGroup;
      const int groups = int(left < kUnitGroups ? left : kUnitGroups);
      Floats unit[kUnitGroups * kVectors];
      dequantize_groups(weight, k, groups, unit);
      for (int t = 0; t < tokens; ++t) {
        Floats* const partial = sums[t].partials[k / kUnit % kPartials];
        Floats partials[kVectors];
        for (int i = 0; i < kVectors; ++i) partials[i] = partial[i];
        const auto* from = x + t * args.x_stride + k;
        for (int g = 0; g < groups; ++g) {
          for (int i = 0; i < kVectors; ++i, from += V::kWidth) {
            partials[i] = V::fma(unit[g * kVectors + i], V::load(Element{}, from), partials[i]);
          }
        }
        for (int i = 0; i < kVectors; ++i) partial[i] = partials[i];
      }
    }
    for (int t = 0; t < tokens; ++t) {
      float totals[kPartials];
      for (int p = 0; p < kPartials; ++p) {
        float s[kGroup];
        memcpy(s, sums[t].partials[p], sizeof s);
        for (int e = 0; e < 16; ++e) s[e] = add(s[e], s[e + 16]);
        for (int e = 0; e < 8; ++e) s[e] = add(s[e], s[e + 8]);
        for (int e = 0; e < 4; ++e) s[e] = add(s[e], s[e + 4]);
        totals[p] = add(add(s[0], s[2]), add(s[1], s[3]));
      }
      const float sum = meet(totals[0], totals[1], totals[2], totals[3], totals[4], totals[5],
                             totals[6], totals[7]);
      with_element(args.y_type, [&](auto element) {
        store_output<decltype(element)>(args, first + t, row, sum);
      });
    }
  }

  static void matvec(const bcy_gguf_matmul_args& args, int64_t begin, int64_t end) {
    with_element(args.x_type, [&](auto element) {
      for (int64_t first = 0; first < args.m; first += kTokenTile) {
        const int64_t left = args.m - first;
        const int tokens = int(left < kTokenTile ? left : kTokenTile);
        for (int64_t row = begin; row < end; ++row) {
          multiply_row<decltype(element)>(args, row, first, tokens);
        }
      }
    });
  }
};

}  // namespace
}  // namespace bcy::cpu
