// SPDX-License-Identifier: Apache-2.0
// The units of a row, and how eight sums meet in vectors.
#pragma once

#include <immintrin.h>

#include "baracuda/order.cuh"

namespace bcy::cpu {
namespace {

// meet() of each of eight vectors' elements.
BCY_INLINE __m256 meet_each(const __m256* eights) {
  __m256 fours[4], twos[2];
  for (int i = 0; i < 4; ++i) {  // s[e] += s[e + 4], of vectors i and i + 4
    fours[i] = _mm256_add_ps(_mm256_permute2f128_ps(eights[i], eights[i + 4], 0x20),
                             _mm256_permute2f128_ps(eights[i], eights[i + 4], 0x31));
  }
  for (int i = 0; i < 2; ++i) {
    twos[i] = _mm256_add_ps(_mm256_shuffle_ps(fours[2 * i], fours[2 * i + 1], 0x44),
                            _mm256_shuffle_ps(fours[2 * i], fours[2 * i + 1], 0xee));
  }
  return _mm256_add_ps(_mm256_shuffle_ps(twos[0], twos[1], 0x88),
                       _mm256_shuffle_ps(twos[0], twos[1], 0xdd));
}

// How K divides into units, the last of which may be short.
struct Units {
  int64_t ncols;
  int64_t count;

  BCY_INLINE explicit Units(int64_t columns) : ncols(columns), count(unit_count(columns)) {}
  BCY_INLINE int elements(int64_t unit) const {
    const int64_t left = ncols - unit * kUnit;
    return left < kUnit ? int(left) : kUnit;
  }
  BCY_INLINE int groups(int64_t unit) const { return (elements(unit) + kGroup - 1) / kGroup; }
};

}  // namespace
}  // namespace bcy::cpu
