// SPDX-License-Identifier: Apache-2.0
// Dequantization, for any instruction set V (see products.h and staging.h), which has besides
//
//   splat(value)
//   widen<i, is_unsigned>(codes)   vector i of the 32 codes of a group, as Floats
//   store(Element, y, floats)      rounded, with one NaN for all
#pragma once

#include <immintrin.h>

#include <utility>

#include "cpu/gguf/layout.h"
#include "cpu/units.h"

namespace bcy::cpu {
namespace {

// The 32 codes of a group in their order: what Format::codes gives word by word.
typedef uint32_t Words8 __attribute__((vector_size(32)));

template <class T>
BCY_INLINE T load_bytes(const uint8_t* p) {
  T value;
  memcpy(&value, p, sizeof value);
  return value;
}
// Element j in the low nibble of p[j], j + 16 in the high one.
BCY_INLINE Words8 nibbles_at(const uint8_t* p) {
  const Words8 twice = (Words8)_mm256_broadcastsi128_si256(load_bytes<__m128i>(p));
  return twice >> Words8{0, 0, 0, 0, 4, 4, 4, 4} & 0x0f0f0f0fu;
}
// Bit j to bit kPlace of byte j.
template <int kPlace>
BCY_INLINE Words8 spread_bits_of(uint32_t bits) {
  const Words8 fours =
      Words8{bits, bits, bits, bits, bits, bits, bits, bits} >> Words8{0, 4, 8, 12, 16, 20, 24, 28};
  return (fours & 15u) * (0x00204081u << kPlace) & 0x01010101u << kPlace;
}
BCY_INLINE Words8 look_up(const Table16& table, Words8 nibbles) {
  const __m256i entries = _mm256_broadcastsi128_si256(load_bytes<__m128i>((const uint8_t*)&table));
  return (Words8)_mm256_shuffle_epi8(entries, (__m256i)nibbles);
}

template <class Format>
BCY_INLINE Words8 group_codes(Bytes<Format::kAlignment> block, int group) {
  const uint8_t* const bytes = block.base + block.at;
  if constexpr (std::is_same_v<Format, Q4_0>) {
    return nibbles_at(bytes + 2) << 4 ^ 0x80808080u;
  } else if constexpr (std::is_same_v<Format, Q4_1>) {
    return nibbles_at(bytes + 4);
  } else if constexpr (std::is_same_v<Format, Q5_0>) {
    return nibbles_at(bytes + 6) << 3 ^ spread_bits_of<7>(~block.load32(2, 0));
  } else if constexpr (std::is_same_v<Format, Q5_1>) {
    return nibbles_at(bytes + 8) | spread_bits_of<4>(block.load32(4, 0));
  } else if constexpr (std::is_same_v<Format, IQ4_NL>) {
    return look_up(iq4_table(), nibbles_at(bytes + 2));
  } else if constexpr (std::is_same_v<Format, IQ4_XS>) {
    return look_up(iq4_table(), nibbles_at(bytes + 8 + 16 * group));
  } else if constexpr (std::is_same_v<Format, MXFP4>) {
    return look_up(e2m1_table(), nibbles_at(bytes + 1));
  } else {
    // Word operations on 32 bytes in a row: the compiler makes vectors of them, unless it sees that
    // another group has loaded some of the words already.
    asm volatile("" ::: "memory");
    uint32_t words[8];
    for (int word = 0; word < 8; ++word) {
      words[word] = Format::codes(block, group, word / 4, word % 4);
    }
    Words8 codes;
    memcpy(&codes, words, sizeof codes);
    return codes;
  }
}

template <class V, class Format>
struct Dequantize {
  using Floats = typename V::Floats;
  using L = Layout<Format>;
  using Block = Bytes<Format::kAlignment>;
  static constexpr int kVectors = kGroup / V::kWidth;

  // What the codes of either half are multiplied by, and what is added.
  struct Affine {
    Floats scales[L::kHalves];
    Floats minima[L::kHalves];
  };

  template <int i = 0>
  static BCY_INLINE void dequantize_vectors(const Affine& affine, Words8 codes, Floats* values) {
    if constexpr (i < kVectors) {
      constexpr int half = L::kHalves == 2 ? i * V::kWidth / 16 : 0;
      const Floats code = V::template widen<i, Format::kUnsignedCodes>(codes);
      if constexpr (Format::kMinima == 0) {
        values[i] = code * affine.scales[half];
      } else {
        values[i] = V::fma(affine.scales[half], code, affine.minima[half]);
      }
      dequantize_vectors<i + 1>(affine, codes, values);
    }
  }
  static BCY_INLINE void dequantize_group(Block block, int group, Floats* values) {
    const Words8 codes = group_codes<Format>(block, group);
    // The scale takes out the codes' factor 2^shift: exact, and so the same values.
    const float scale = mul(Format::scale(block, group), 1.0f / float(1 << Format::shift(group)));
    // All of it before values are stored: these might be the block's bytes, as far as the compiler
    // knows, and would have it decode the scales again.
    Affine affine;
    for (int half = 0; half < L::kHalves; ++half) {
      float w = scale;
      if constexpr (L::kHalves == 2) w = mul(w, float(half_scale<Format>(block, group, half)));
      affine.scales[half] = V::splat(w);
      if constexpr (Format::kMinima > 0) {
        affine.minima[half] = V::splat(Format::minimum(block, group, half));
      }
    }
    dequantize_vectors(affine, codes, values);
  }

  // The unit that starts at `unit`, or its first `groups` groups where the row ends.
  static __attribute__((noinline)) void dequantize_unit(const uint8_t* unit, int groups,
                                                        Floats* values) {
    if constexpr (Format::kElements == kUnit) {
      dequantize_block(Block(unit), values, std::make_integer_sequence<int, kUnitGroups>());
    } else {
      for (int g = 0; g < groups; ++g) {
        dequantize_group(Block(unit + g * Format::kBytes), 0, values + g * kVectors);
      }
    }
  }
  template <int... g>
  static BCY_INLINE void dequantize_block(Block block, Floats* values,
                                          std::integer_sequence<int, g...>) {
    (dequantize_group(block, g, values + g * kVectors), ...);  // g is a constant in each
  }

  static void dequantize(const bcy_gguf_dequantize_args& args, int64_t begin, int64_t end) {
    const int64_t stride = row_bytes<Format>(args.ncols);
    const Units units(args.ncols);
    with_element(args.y_type, [&](auto element) {
      using Element = decltype(element);
      for (int64_t row = begin; row < end; ++row) {
        const uint8_t* const weight = static_cast<const uint8_t*>(args.weight) + row * stride;
        auto* y = static_cast<typename Element::Storage*>(args.y) + row * args.y_stride;
        for (int64_t unit = 0; unit < units.count; ++unit) {
          const int groups = units.groups(unit);
          Floats values[kUnitGroups * kVectors];
          dequantize_unit(weight + unit * L::kUnitBytes, groups, values);
          for (int i = 0; i < groups * kVectors; ++i, y += V::kWidth) {
            V::store(Element{}, y, values[i]);
          }
        }
      }
    });
  }
};

}  // namespace
}  // namespace bcy::cpu
