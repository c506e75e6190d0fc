// SPDX-License-Identifier: Apache-2.0
// Blocks whose scales are searched for: what each format asks of the search, and how the answer is
// packed.
#pragma once

#include <type_traits>

#include "baracuda/formats.h"
#include "cpu/quantize/closed_form.h"
#include "cpu/quantize/scale_search.h"

namespace bcy::quantize {

// Elements times a power of two that brings the largest near one, so that no square overflows or
// vanishes. It changes no digit, but of elements too small beside the largest to matter.
template <int kElements>
struct Normalized {
  float x[kElements];
  int exponent = 0;
  bool zero = true;

  explicit Normalized(const float* from) {
    float magnitude = 0.0f;
    for (int i = 0; i < kElements; ++i)
      magnitude = std::fabs(from[i]) > magnitude ? std::fabs(from[i]) : magnitude;
    zero = magnitude == 0.0f;
    if (zero) return;
    const int power = -std::ilogb(magnitude);
    exponent = power > 126 ? 126 : power < -126 ? -126 : power;
    const float factor = std::ldexp(1.0f, exponent);
    for (int i = 0; i < kElements; ++i) x[i] = from[i] * factor;
  }
};

// The levels of a group as codes, at the scales chosen.
template <class Levels, int kSize>
void encode(const float* x, float scale, float offset, int* codes) {
  const Lanes inverse = splat(inverse_or_zero(scale)), shift = splat(offset);
  for (int i = 0; i < kSize; i += 4) {
    float levels[4];
    store(levels, Levels::nearest((load(x + i) - shift) * inverse));
    for (int j = 0; j < 4; ++j) codes[i + j] = Levels::code_of(levels[j]);
  }
}

template <class Search>
struct Found {
  typename Search::Result scales;
  int codes[Search::kElements];
};

template <class Search>
Found<Search> find(const float* x) {
  using Levels = typename Search::Range;
  constexpr int kElements = Search::kElements;
  Found<Search> found;
  const Normalized<kElements> block(x);
  if (block.zero) {
    for (int& code : found.codes) code = Levels::code_of(0.0f);
    return found;
  }
  found.scales = Search::run(block.x, block.exponent);
  constexpr int kGroups = std::extent_v<decltype(found.scales.scale)>, kSize = kElements / kGroups;
  for (int g = 0; g < kGroups; ++g) {
    encode<Levels, kSize>(block.x + g * kSize, found.scales.d.value * float(found.scales.scale[g]),
                          -(found.scales.dmin.value * float(found.scales.minimum[g])),
                          found.codes + g * kSize);
  }
  return found;
}

struct Q2_KBlock {
  static constexpr int kElements = 256, kBytes = Q2_K::kBytes;

  static void pack(const float* x, uint8_t* block) {
    const auto found = find<OffsetSearch<Integers<0, 3>, 16, 16, 15, 15>>(x);
    memset(block, 0, kBytes);
    for (int g = 0; g < 16; ++g)
      block[g] = uint8_t(found.scales.scale[g] | found.scales.minimum[g] << 4);
    for (int i = 0; i < 256; ++i)
      block[16 + i / 128 * 32 + i % 32] |= uint8_t(found.codes[i] << 2 * (i / 32 % 4));
    store16(block + 80, uint16_t(found.scales.d.bits));
    store16(block + 82, uint16_t(found.scales.dmin.bits));
  }
};

struct Q3_KBlock {
  static constexpr int kElements = 256, kBytes = Q3_K::kBytes;

  static void pack(const float* x, uint8_t* block) {
    const auto found = find<SignedSearch<Integers<-4, 3>, 16, 16, -32, 31, InHalf>>(x);
    memset(block, 0, kBytes);
    for (int i = 0; i < 256; ++i) {
      block[i % 32] |= uint8_t((found.codes[i] >> 2) << (i / 32));
      block[32 + i / 128 * 32 + i % 32] |= uint8_t((found.codes[i] & 3) << 2 * (i / 32 % 4));
    }
    for (int g = 0; g < 16; ++g) {
      const int scale = found.scales.scale[g] + 32;
      block[96 + g % 8] |= uint8_t((scale & 15) << 4 * (g / 8));
      block[104 + g % 4] |= uint8_t((scale >> 4) << 2 * (g / 4));
    }
    store16(block + 108, uint16_t(found.scales.d.bits));
  }
};

// The twelve bytes of k_scales.cuh.
inline void pack_k_scales(const Scales<8>& scales, uint8_t* packed) {
  for (int g = 0; g < 4; ++g) {
    packed[g] = uint8_t(scales.scale[g] | scales.scale[g + 4] >> 4 << 6);
    packed[g + 4] = uint8_t(scales.minimum[g] | scales.minimum[g + 4] >> 4 << 6);
    packed[g + 8] = uint8_t((scales.scale[g + 4] & 15) | (scales.minimum[g + 4] & 15) << 4);
  }
}

// Q4_K, and Q5_K with its fifth bits between the scales and the nibbles.
template <class Format, int kBits>
struct SixBitScales {
  static constexpr int kElements = 256, kBytes = Format::kBytes;

  static void pack(const float* x, uint8_t* block) {
    const auto found = find<OffsetSearch<Integers<0, (1 << kBits) - 1>, 8, 32, 63, 63>>(x);
    memset(block, 0, kBytes);
    store16(block, uint16_t(found.scales.d.bits));
    store16(block + 2, uint16_t(found.scales.dmin.bits));
    pack_k_scales(found.scales, block + 4);
    for (int i = 0; i < 256; ++i) {
      block[kBytes - 128 + i / 64 * 32 + i % 32] |=
          uint8_t((found.codes[i] & 15) << 4 * (i / 32 % 2));
      if constexpr (kBits == 5) block[16 + i % 32] |= uint8_t(found.codes[i] >> 4 << (i / 32));
    }
  }
};

using Q4_KBlock = SixBitScales<Q4_K, 4>;
using Q5_KBlock = SixBitScales<Q5_K, 5>;

struct Q6_KBlock {
  static constexpr int kElements = 256, kBytes = Q6_K::kBytes;

  static void pack(const float* x, uint8_t* block) {
    const auto found = find<SignedSearch<Integers<-32, 31>, 16, 16, -128, 127, InHalf>>(x);
    memset(block, 0, kBytes);
    for (int i = 0; i < 256; ++i) {
      const int half = i / 128, part = i / 32 % 4;
      block[64 * half + 32 * (part % 2) + i % 32] |=
          uint8_t((found.codes[i] & 15) << 4 * (part / 2));
      block[128 + 32 * half + i % 32] |= uint8_t(found.codes[i] >> 4 << 2 * part);
    }
    for (int g = 0; g < 16; ++g) block[192 + g] = uint8_t(found.scales.scale[g]);
    store16(block + 208, uint16_t(found.scales.d.bits));
  }
};

struct Q8_KBlock {
  static constexpr int kElements = 256, kBytes = Q8_K::kBytes;

  static void pack(const float* x, uint8_t* block) {
    const auto found = find<SignedSearch<Integers<-127, 127>, 1, 256, 1, 1, InFloat>>(x);
    store32(block, found.scales.d.bits);
    for (int g = 0; g < 16; ++g) {
      int sum = 0;
      for (int i = 16 * g; i < 16 * g + 16; ++i) {
        const int code = found.codes[i] - 127;
        block[4 + i] = uint8_t(code);
        sum += code;
      }
      store16(block + 260 + 2 * g, uint16_t(sum));
    }
  }
};

struct IQ4_NLBlock {
  static constexpr int kElements = 32, kBytes = IQ4_NL::kBytes;

  static void pack(const float* x, uint8_t* block) {
    const auto found = find<SignedSearch<Iq4Levels, 1, 32, 1, 1, InHalf>>(x);
    store16(block, uint16_t(found.scales.d.bits));
    pack_nibbles(found.codes, block + 2);
  }
};

struct IQ4_XSBlock {
  static constexpr int kElements = 256, kBytes = IQ4_XS::kBytes;

  static void pack(const float* x, uint8_t* block) {
    const auto found = find<SignedSearch<Iq4Levels, 8, 32, -32, 31, InHalf>>(x);
    memset(block, 0, kBytes);
    store16(block, uint16_t(found.scales.d.bits));
    uint32_t high = 0;
    for (int g = 0; g < 8; ++g) {
      const int scale = found.scales.scale[g] + 32;
      block[4 + g / 2] |= uint8_t((scale & 15) << 4 * (g % 2));
      high |= uint32_t(scale >> 4) << 2 * g;
      pack_nibbles(found.codes + 32 * g, block + 8 + 16 * g);
    }
    store16(block + 2, uint16_t(high));
  }
};

}  // namespace bcy::quantize
