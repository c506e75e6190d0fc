// SPDX-License-Identifier: Apache-2.0
// What an element of a block can be before it is scaled, and how a number finds its nearest level.
//
// kOutermost, kInnermost: where the search puts the largest element of a group, as a factor of the
// level at the end. Beyond the end (it is clipped, the others gain) is seldom worth more than half
// a level; with few levels, further inside is often better.
#pragma once

#include "baracuda/formats/table16.cuh"
#include "cpu/quantize/lanes.h"

namespace bcy::quantize {

// The integers from kFirst to kLast.
template <int kFirst, int kLast>
struct Integers {
  static constexpr float kLowest = kFirst, kHighest = kLast;
  static constexpr float kOutermost = 1.0f + 0.5f / kLast;
  static constexpr float kInnermost = kLast < 7 ? 0.6f : 1.0f - 2.5f / kLast;

  static Lanes nearest(Lanes t) {
    const Lanes low = splat(kLowest), high = splat(kHighest);
    t = t > low ? t : low;
    t = t < high ? t : high;
    // Adding 1.5 * 2^23 leaves no room for a fraction: the sum is the nearest integer, ties to
    // even.
    const Lanes room = splat(12582912.0f);
    return (t + room) - room;
  }

  // Codes count from the lowest level.
  static int code_of(float level) { return int(level) - kFirst; }
};

// The sixteen levels of IQ4_NL and IQ4_XS; a code is the place in the table.
struct Iq4Levels {
  static constexpr float kLowest = -127.0f, kHighest = 113.0f;
  static constexpr float kOutermost = 1.1f, kInnermost = 0.75f;

  static Lanes nearest(Lanes t) {
    // In halves from -128 on, because the middle between two levels is a multiple of a half.
    t = t + t + splat(256.0f);
    t = t > splat(0.0f) ? t : splat(0.0f);
    t = t < splat(511.0f) ? t : splat(511.0f);
    const Mask i = __builtin_convertvector(t, Mask);
    const float* levels = kNearest.levels;
    return Lanes{levels[i[0]], levels[i[1]], levels[i[2]], levels[i[3]]};
  }

  static int code_of(float level) {
    int code = 0;
    for (int i = 1; i < 16; ++i) code += level >= float(at(i));
    return code;
  }

 private:
  static constexpr int at(int i) { return int8_t(iq4_table().words[i / 4] >> 8 * (i % 4)); }

  struct Nearest {
    float levels[512] = {};

    constexpr Nearest() {
      for (int half = 0, i = 0; half < 512; ++half) {
        while (i < 15 && half - 256 >= at(i) + at(i + 1)) ++i;
        levels[half] = float(at(i));
      }
    }
  };
  static const Nearest kNearest;
};

inline constexpr Iq4Levels::Nearest Iq4Levels::kNearest{};

}  // namespace bcy::quantize
