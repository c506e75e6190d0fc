// SPDX-License-Identifier: Apache-2.0
// The search for the scales of a block that give the smallest squared error.
//
// A block of several groups is read back as d * scale[g] * level - dmin * minimum[g], with integers
// scale[g] and minimum[g] of a few bits; d and dmin have 11 significant bits. Given the scales,
// every element takes its nearest level, so the error is a function of the scales alone; but a
// jagged one, full of local minima, because any small change moves some elements to another level.
// So:
//
//   1. Estimate for every group by itself a real-valued scale and offset: guess some, choose
//      levels, solve the least squares problem that has these levels (its solution is closed), keep
//      the best.
//   2. Take some d and dmin that suit the largest estimates, rounded as they will be stored. Under
//      each of them, try for every group the integers around its estimates, and measure the error
//      that a reader of the block will have. Trying the neighbours is worth more than rounding
//      finely: their errors scatter by 10 to 20 per cent.
//   3. With all levels and integers of the best so far, solve for d and dmin together, and repeat 2
//      with the solution.
//
// Nothing is kept that does not make the error smaller, all roundings included.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#include "baracuda/numeric.h"
#include "cpu/quantize/lanes.h"
#include "cpu/quantize/levels.h"

namespace bcy::quantize {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A scale too small to be inverted reads back as nothing anyway.
inline float inverse_or_zero(float scale) {
  return std::fabs(scale) >= std::numeric_limits<float>::min() ? 1.0f / scale : 0.0f;
}

// What the least-squares problems are made of: sums over a group of its levels c and elements x.
struct Moments {
  float c, cc, cx;
};

template <class Levels, int kSize>
Moments moments(const float* x, float scale, float offset) {
  const Lanes inverse = splat(inverse_or_zero(scale)), shift = splat(offset);
  Lanes c = splat(0.0f), cc = c, cx = c;
  for (int i = 0; i < kSize; i += 4) {
    const Lanes v = load(x + i);
    const Lanes level = Levels::nearest((v - shift) * inverse);
    c += level;
    cc += level * level;
    cx += level * v;
  }
  return {total(c), total(cc), total(cx)};
}

// Squared error of a group read back as scale * level + offset.
template <class Levels, int kSize>
float error_of(const float* x, float scale, float offset) {
  const Lanes inverse = splat(inverse_or_zero(scale)), unit = splat(scale), shift = splat(offset);
  Lanes even = splat(0.0f), odd = even;
  for (int i = 0; i < kSize; i += 8) {
    const Lanes a = load(x + i) - shift, b = load(x + i + 4) - shift;
    const Lanes r = a - unit * Levels::nearest(a * inverse);
    const Lanes s = b - unit * Levels::nearest(b * inverse);
    even += r * r;
    odd += s * s;
  }
  return total(even + odd);
}

template <int kSize>
float sum_of_squares(const float* x) {
  Lanes even = splat(0.0f), odd = even;
  for (int i = 0; i < kSize; i += 8) {
    even += load(x + i) * load(x + i);
    odd += load(x + i + 4) * load(x + i + 4);
  }
  return total(even + odd);
}

// d or dmin: its bits in the block, and its value beside elements that were multiplied by
// 2^exponent.
struct Superscale {
  float value = 0.0f;
  uint32_t bits = 0;
};

struct InHalf {
  static Superscale round(float wanted, int exponent) {
    float d = std::ldexp(wanted, -exponent);
    // The nearest number that is finite and, since zero would lose the whole block, not zero.
    d = d > 65504.0f ? 65504.0f : d < -65504.0f ? -65504.0f : d;
    if (d != 0.0f && std::fabs(d) < 0x1p-24f) d = std::copysign(0x1p-24f, d);
    const uint16_t bits = float_to_half(d);
    return {std::ldexp(half_to_float(bits), exponent), bits};
  }
};

struct InFloat {
  static Superscale round(float wanted, int exponent) {
    // The largest whose product with a level of 127 is finite.
    constexpr float kLargest = std::numeric_limits<float>::max() / 127 * (1.0f - 0x1p-23f);
    float d = std::ldexp(wanted, -exponent);
    d = d > kLargest ? kLargest : d < -kLargest ? -kLargest : d;
    return {std::ldexp(d, exponent), as_bits(d)};
  }
};

template <int kGroups>
struct Scales {
  Superscale d, dmin;
  int scale[kGroups] = {}, minimum[kGroups] = {};
  float error = kInfinity;
};

// The integers in [lowest, highest] next to a real number: the nearest and `reach` on either side.
struct Neighbours {
  int first, last;

  Neighbours(float center, int reach, int lowest, int highest) {
    const float inside = center < lowest ? lowest : center > highest ? highest : center;
    const int middle = int(std::floor(inside + 0.5f));
    first = middle - reach < lowest ? lowest : middle - reach;
    last = middle + reach > highest ? highest : middle + reach;
  }
};

constexpr int kRefits = 2;

// Blocks without minima, whose levels lie on both sides of zero. With a single group its scale is d
// itself (kScaleFirst = kScaleLast = 1).
template <class Levels, int kGroups, int kSize, int kScaleFirst, int kScaleLast, class Stored>
class SignedSearch {
 public:
  using Range = Levels;
  using Result = Scales<kGroups>;
  static constexpr int kElements = kGroups * kSize;

  static Result run(const float* x, int exponent) {
    SignedSearch search(x, exponent);
    for (int g = 0; g < kGroups; ++g) search.estimate(g);
    if constexpr (kGroups == 1) {
      for (int side = 0; side < kSides; ++side) {
        const float end = side == 0 ? Levels::kLowest : Levels::kHighest;
        search.try_superscale(search.estimates_[0][side]);
        // The largest element exactly at the end: so do blocks of few distinct values become exact.
        search.try_superscale(1.0f / (end / search.extreme_));
      }
    } else {
      search.try_superscale(search.largest_ / kScaleFirst);
      search.try_superscale(search.largest_ / (kScaleFirst + 2));
    }
    for (int i = 0; i < kRefits; ++i) {
      const float before = search.best_.error;
      search.try_superscale(search.refit());
      if (!(search.best_.error < before)) break;
    }
    // What is left of the error in blocks whose values hardly differ is what d was rounded by, and
    // each d is by something else.
    if (kGroups > 1 && search.best_.error < kHardly * sum_of_squares<kElements>(x)) {
      for (int i = 1; i <= kMoreTries; ++i) {
        search.try_superscale(search.largest_ / (kScaleFirst + i));
        search.try_superscale(search.furthest_ / (Levels::kLowest * (kScaleFirst + i - 1)));
      }
    }
    // Elements far below the smallest float16 are nearer to zero than to any level of it. Last, so
    // that those far above the largest, where all errors are alike, keep what is nearest.
    if constexpr (kGroups == 1) search.try_superscale(0.0f);
    return search.best_;
  }

 private:
  // The largest element can go to the lowest level or, with the sign of the scale changed, to the
  // highest one. Where these mirror each other there is one estimate; where they nearly do, only
  // the better estimate is followed up.
  static constexpr float kAsymmetry = -Levels::kLowest / Levels::kHighest;
  static constexpr int kSides = kAsymmetry == 1.0f ? 1 : 2;
  static constexpr int kFollowed = kGroups == 1 || kAsymmetry < 1.05f ? 1 : 2;
  static constexpr int kGuesses = 16 / kSides;
  // Scales of 8 bits lie closer, so more of them are near.
  static constexpr int kReach = kScaleFirst < -64 ? 5 : 1;
  static constexpr float kHardly = 0x1p-14f;
  static constexpr int kMoreTries = 8;

  SignedSearch(const float* x, int exponent) : x_(x), exponent_(exponent) {}

  void estimate(int g) {
    const float* x = x_ + g * kSize;
    extreme_ = 0.0f;
    for (int i = 0; i < kSize; ++i) {
      if (std::fabs(x[i]) > std::fabs(extreme_)) extreme_ = x[i];
    }
    if (std::fabs(extreme_) > std::fabs(furthest_)) furthest_ = extreme_;
    // At the best scale for given levels the error is sum(x^2) - explained.
    float explained[2] = {};
    for (int side = 0; side < kSides; ++side) {
      const float end = side == 0 ? Levels::kLowest : Levels::kHighest;
      for (int i = 0; i < kGuesses; ++i) {
        const float place =
            Levels::kOutermost - (Levels::kOutermost - Levels::kInnermost) / kGuesses * float(i);
        const Moments sums = moments<Levels, kSize>(x, extreme_ / (end * place), 0.0f);
        if (sums.cx * sums.cx > explained[side] * sums.cc) {
          explained[side] = sums.cx * sums.cx / sums.cc;
          estimates_[g][side] = sums.cx / sums.cc;
        }
      }
    }
    if (explained[1] > explained[0]) std::swap(estimates_[g][0], estimates_[g][1]);
    if (std::fabs(estimates_[g][0]) > std::fabs(largest_)) largest_ = estimates_[g][0];
  }

  void try_superscale(float wanted) {
    Result trial;
    trial.d = Stored::round(wanted, exponent_);
    trial.error = 0.0f;
    const float d = trial.d.value, inverse = inverse_or_zero(d);
    for (int g = 0; g < kGroups; ++g) {
      float least = kInfinity;
      for (int i = 0; i < kFollowed; ++i) {
        const Neighbours scales(estimates_[g][i] * inverse, kReach, kScaleFirst, kScaleLast);
        for (int scale = scales.first; scale <= scales.last; ++scale) {
          const float error = error_of<Levels, kSize>(x_ + g * kSize, d * float(scale), 0.0f);
          if (error < least) {
            least = error;
            trial.scale[g] = scale;
          }
        }
      }
      trial.error += least;
    }
    if (trial.error < best_.error) best_ = trial;
  }

  float refit() const {
    float numerator = 0.0f, denominator = 0.0f;
    for (int g = 0; g < kGroups; ++g) {
      const float scale = float(best_.scale[g]);
      const Moments sums = moments<Levels, kSize>(x_ + g * kSize, best_.d.value * scale, 0.0f);
      numerator += scale * sums.cx;
      denominator += scale * scale * sums.cc;
    }
    return denominator > 0.0f ? numerator / denominator : best_.d.value;
  }

  const float* x_;
  int exponent_;
  float extreme_ = 0.0f;  // of a group
  float furthest_ = 0.0f;  // of the block
  float estimates_[kGroups][2] = {};  // the better one first
  float largest_ = 0.0f;  // of the better ones
  Result best_;
};

// Blocks with minima, whose levels count from zero up.
template <class Levels, int kGroups, int kSize, int kScaleLast, int kMinimumLast>
class OffsetSearch {
 public:
  using Range = Levels;
  using Result = Scales<kGroups>;
  static constexpr int kElements = kGroups * kSize;

  static Result run(const float* x, int exponent) {
    OffsetSearch search(x, exponent);
    bool below = false, above = false;
    for (int g = 0; g < kGroups; ++g) {
      search.estimate(g);
      below |= search.estimates_[g].offset < 0.0f;
      above |= search.estimates_[g].offset > 0.0f;
    }
    // The minima of a block have the sign of dmin in common. Groups that all lie well above zero
    // want it negative.
    if (below || !above) search.run_with_sign(1.0f);
    if (above) search.run_with_sign(-1.0f);
    return search.best_;
  }

 private:
  struct Estimate {
    float scale = 0.0f, offset = 0.0f;
    float level = 0.0f;  // mean level under this scale and offset
  };

  static constexpr int kReach = 1;

  // A guess moves the smallest and the largest element so many steps in from the ends of the
  // levels. Moving one out by a step leaves a level unused, which suits elements of few values.
  static constexpr float kMoves[] = {0.0f, 0.25f, 0.5f, -0.25f, -1.0f};

  OffsetSearch(const float* x, int exponent) : x_(x), exponent_(exponent) {}

  void estimate(int g) {
    float centered[kSize];
    float low = x_[g * kSize], high = low, sum = 0.0f;
    for (int i = 0; i < kSize; ++i) {
      const float value = x_[g * kSize + i];
      low = value < low ? value : low;
      high = value > high ? value : high;
      sum += value;
    }
    // Around the mean, so that a small spread beside a large offset keeps its digits; and the
    // covariance of elements and levels becomes the plain sum of products.
    const float mean = sum / kSize;
    for (int i = 0; i < kSize; ++i) centered[i] = x_[g * kSize + i] - mean;
    means_[g] = mean;
    estimates_[g] = {0.0f, mean, 0.0f};
    const float step = (high - low) / Levels::kHighest;
    float explained = 0.0f;
    for (const float up : kMoves) {
      for (const float down : kMoves) {
        const float from = low - mean + step * up, to = high - mean - step * down;
        const Moments sums = moments<Levels, kSize>(centered, (to - from) / Levels::kHighest, from);
        const float variance = sums.cc - sums.c * sums.c / kSize;
        // Guesses that differ by rounding only are equal: the first is kept, so that groups alike
        // get scales alike.
        if (variance > 0.0f && sums.cx * sums.cx > 1.000001f * explained * variance) {
          explained = sums.cx * sums.cx / variance;
          const float scale = sums.cx / variance, level = sums.c / kSize;
          estimates_[g] = {scale, mean - scale * level, level};
        }
      }
    }
  }

  // For a group whose offset would need the other sign: the best scale with none.
  Estimate estimate_without_offset(int g) const {
    const float* x = x_ + g * kSize;
    float highest = 0.0f;
    for (int i = 0; i < kSize; ++i) highest = x[i] > highest ? x[i] : highest;
    constexpr int kGuesses = 8;
    Estimate result;
    float explained = 0.0f;
    for (int i = 0; i < kGuesses; ++i) {
      const float place =
          Levels::kOutermost - (Levels::kOutermost - Levels::kInnermost) / kGuesses * float(i);
      const Moments sums = moments<Levels, kSize>(x, highest / (Levels::kHighest * place), 0.0f);
      if (sums.cx > 0.0f && sums.cx * sums.cx > explained * sums.cc) {
        explained = sums.cx * sums.cx / sums.cc;
        result = {sums.cx / sums.cc, 0.0f, sums.c / kSize};
      }
    }
    return result;
  }

  void run_with_sign(float sign) {
    Estimate from[kGroups];
    float largest_scale = 0.0f, largest_offset = 0.0f;
    for (int g = 0; g < kGroups; ++g) {
      from[g] = estimates_[g].offset * sign > 0.0f ? estimate_without_offset(g) : estimates_[g];
      if (from[g].scale > largest_scale) largest_scale = from[g].scale;
      if (std::fabs(from[g].offset) > largest_offset) largest_offset = std::fabs(from[g].offset);
    }
    for (int i = 0; i < 2; ++i) {
      try_superscales(largest_scale / float(kScaleLast - i),
                      sign * largest_offset / float(kMinimumLast - i), from);
    }
    for (int i = 0; i < kRefits; ++i) {
      const float before = best_.error;
      float d, dmin;
      refit(&d, &dmin);
      try_superscales(d, dmin, from);
      if (!(best_.error < before)) break;
    }
  }

  void try_superscales(float wanted_d, float wanted_dmin, const Estimate* from) {
    Result trial;
    trial.d = InHalf::round(wanted_d, exponent_);
    trial.dmin = InHalf::round(wanted_dmin, exponent_);
    trial.error = 0.0f;
    const float d = trial.d.value, dmin = trial.dmin.value;
    const float inverse_d = inverse_or_zero(d), inverse_dmin = inverse_or_zero(dmin);
    for (int g = 0; g < kGroups; ++g) {
      float least = kInfinity;
      const Neighbours scales(from[g].scale * inverse_d, kReach, 0, kScaleLast);
      for (int scale = scales.first; scale <= scales.last; ++scale) {
        // Another scale turns about the mean: the offset that keeps the mean level on the mean
        // element.
        const float offset = from[g].offset + (from[g].scale - d * float(scale)) * from[g].level;
        const Neighbours minima(-offset * inverse_dmin, kReach, 0, kMinimumLast);
        for (int minimum = minima.first; minimum <= minima.last; ++minimum) {
          const float error =
              error_of<Levels, kSize>(x_ + g * kSize, d * float(scale), -(dmin * float(minimum)));
          if (error < least) {
            least = error;
            trial.scale[g] = scale;
            trial.minimum[g] = minimum;
          }
        }
      }
      trial.error += least;
    }
    if (trial.error < best_.error) best_ = trial;
  }

  // The two linear equations for d and dmin.
  void refit(float* d, float* dmin) const {
    float aa = 0.0f, ab = 0.0f, bb = 0.0f, ax = 0.0f, bx = 0.0f;
    for (int g = 0; g < kGroups; ++g) {
      const float a = float(best_.scale[g]), b = -float(best_.minimum[g]);
      const Moments sums =
          moments<Levels, kSize>(x_ + g * kSize, best_.d.value * a, best_.dmin.value * b);
      aa += a * a * sums.cc;
      ab += a * b * sums.c;
      bb += b * b * kSize;
      ax += a * sums.cx;
      bx += b * means_[g] * kSize;
    }
    *d = best_.d.value;
    *dmin = best_.dmin.value;
    const float determinant = aa * bb - ab * ab;
    if (determinant > 1e-6f * aa * bb) {
      *d = (ax * bb - bx * ab) / determinant;
      *dmin = (bx * aa - ax * ab) / determinant;
    } else if (bb == 0.0f && aa > 0.0f) {
      *d = ax / aa;
    } else if (aa == 0.0f && bb > 0.0f) {
      *dmin = bx / bb;
    }
  }

  const float* x_;
  int exponent_;
  float means_[kGroups];
  Estimate estimates_[kGroups];
  Result best_;
};

}  // namespace bcy::quantize
