// SPDX-License-Identifier: Apache-2.0
// Formats whose bytes are fixed by ggml's C code: the scale follows from the extremes of a block,
// and every element is rounded once. Each expression below therefore keeps ggml's order of
// operations and its way of rounding.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "baracuda/formats.h"

namespace bcy::quantize {

inline void store16(uint8_t* to, uint16_t value) { memcpy(to, &value, sizeof value); }
inline void store32(uint8_t* to, uint32_t value) { memcpy(to, &value, sizeof value); }
inline void store_half(uint8_t* to, float value) { store16(to, float_to_half(value)); }

// 1 / d is infinite for a scale below 2^-128, and then the products are infinite or NaN: those
// elements take code 0, which is what ggml's conversion to int gives on x86.
inline int truncate(float value, int highest) {
  if (!(std::fabs(value) < 256.0f)) return 0;
  const int code = int(value);
  return code < highest ? code : highest;
}

inline float inverse(float d) { return d != 0.0f ? 1.0f / d : 0.0f; }

// Element j in the low nibble of byte j, element j + 16 in the high one.
inline void pack_nibbles(const int* codes, uint8_t* qs) {
  for (int j = 0; j < 16; ++j) qs[j] = uint8_t((codes[j] & 15) | (codes[j + 16] & 15) << 4);
}

inline uint32_t fifth_bits(const int* codes) {
  uint32_t bits = 0;
  for (int j = 0; j < 32; ++j) bits |= uint32_t(codes[j] >> 4 & 1) << j;
  return bits;
}

// Q4_0, Q5_0: the element of largest magnitude (the first of equals) takes the code furthest from
// the middle.
template <class Format, int kBits>
struct SignedExtreme {
  static constexpr int kElements = 32, kBytes = Format::kBytes;

  static void pack(const float* x, uint8_t* block) {
    constexpr int kMiddle = 1 << (kBits - 1);
    float magnitude = 0.0f, extreme = 0.0f;
    for (int j = 0; j < 32; ++j) {
      if (magnitude < std::fabs(x[j])) {
        magnitude = std::fabs(x[j]);
        extreme = x[j];
      }
    }
    const float d = extreme / -kMiddle;
    const float scale = inverse(d);
    int codes[32];
    for (int j = 0; j < 32; ++j)
      codes[j] = truncate(x[j] * scale + (kMiddle + 0.5f), 2 * kMiddle - 1);
    store_half(block, d);
    if constexpr (kBits == 5) store32(block + 2, fifth_bits(codes));
    pack_nibbles(codes, block + kBytes - 16);
  }
};

// Q4_1, Q5_1: codes count steps from the smallest element.
template <class Format, int kBits>
struct MinimumAndRange {
  static constexpr int kElements = 32, kBytes = Format::kBytes;

  static void pack(const float* x, uint8_t* block) {
    constexpr int kHighest = (1 << kBits) - 1;
    float lowest = x[0], highest = x[0];
    for (int j = 1; j < 32; ++j) {
      if (x[j] < lowest) lowest = x[j];
      if (x[j] > highest) highest = x[j];
    }
    const float d = (highest - lowest) / kHighest;
    const float scale = inverse(d);
    int codes[32];
    for (int j = 0; j < 32; ++j) codes[j] = truncate((x[j] - lowest) * scale + 0.5f, kHighest);
    store_half(block, d);
    store_half(block + 2, lowest);
    if constexpr (kBits == 5) store32(block + 4, fifth_bits(codes));
    pack_nibbles(codes, block + kBytes - 16);
  }
};

using Q4_0Block = SignedExtreme<Q4_0, 4>;
using Q5_0Block = SignedExtreme<Q5_0, 5>;
using Q4_1Block = MinimumAndRange<Q4_1, 4>;
using Q5_1Block = MinimumAndRange<Q5_1, 5>;

struct Q8_0Block {
  static constexpr int kElements = 32, kBytes = Q8_0::kBytes;

  static void pack(const float* x, uint8_t* block) {
    float magnitude = 0.0f;
    for (int j = 0; j < 32; ++j)
      magnitude = std::fabs(x[j]) > magnitude ? std::fabs(x[j]) : magnitude;
    const float d = magnitude / 127;
    const float scale = inverse(d);
    store_half(block, d);
    for (int j = 0; j < 32; ++j) {
      // Ties go away from zero: the largest float below a half carries a tie to the next integer
      // and nothing less.
      const float v = x[j] * scale;
      block[2 + j] = uint8_t(truncate(v + std::copysign(0x1.fffffep-2f, v), 127));
    }
  }
};

struct MXFP4Block {
  static constexpr int kElements = 32, kBytes = MXFP4::kBytes;

  static void pack(const float* x, uint8_t* block) {
    float magnitude = 0.0f;
    for (int j = 0; j < 32; ++j)
      magnitude = std::fabs(x[j]) > magnitude ? std::fabs(x[j]) : magnitude;
    // The exponent comes from log2 rounded to float, which reaches the next integer a little below
    // the power of two. Blocks below 2^-125 wrap round to an exponent at which every element rounds
    // to zero.
    int e = 0;
    if (magnitude > 0.0f) e = int(std::floor(float(std::log2(double(magnitude))))) - 2 + 127;
    block[0] = uint8_t(e);
    const float unit = MXFP4::scale(Bytes<MXFP4::kAlignment>(block), 0);
    // Nearest value, the smaller magnitude in a tie. The thresholds are exact: values of at most
    // three bits. What exceeds float32 at this exponent is out of reach.
    static constexpr float kValues[8] = {0, 1, 2, 3, 4, 6, 8, 12};
    float thresholds[7];
    for (int i = 0; i < 7; ++i) {
      const float middle = 0.5f * (kValues[i] + kValues[i + 1]);
      const bool reachable = is_finite(kValues[i + 1] * unit);
      thresholds[i] = reachable ? middle * unit : std::numeric_limits<float>::infinity();
    }
    int codes[32];
    for (int j = 0; j < 32; ++j) {
      int code = 0;
      for (float threshold : thresholds) code += std::fabs(x[j]) > threshold;
      codes[j] = code != 0 && x[j] < 0.0f ? code + 8 : code;
    }
    pack_nibbles(codes, block + 1);
  }
};

}  // namespace bcy::quantize
