// SPDX-License-Identifier: Apache-2.0
// The product of weights as floats with float activations, in the order of order.cuh, for K that is
// whole groups and any instruction set V:
//
//   Words, Floats          GCC vectors of V::kWidth elements of 32 bits
//   load(Element, x)       kWidth elements as floats
//   store(Element, y, v)   rounded, with one NaN for all
//   fma                    a * b + c
//   splat(value)
//   fold(vectors)          of the 32 elements of a group: sums of e, e + 16, then of e, e + 8, for
//                          e = 0 .. 7
//
// and any Rows of weights:
//
//   dequantize(row, unit, groups, values)   the first groups of a unit
//   prefetch(row, unit)                     soon dequantize will be called for it
//   multiply<rows, tokens, Element>(row, end, partial, units, x, sums)
//                                           few tokens and units partial, partial + 8, ...; beyond
//                                           the end any row
#pragma once

#include <immintrin.h>

#include "cpu/elements.h"
#include "cpu/units.h"

namespace bcy::cpu {
namespace {

// The last steps of the order in order.cuh: element sums e, e + 8, ... of every partial to one sum.
BCY_INLINE float meet_eights(const __m256* eights) {
  const __m256 p = meet_each(eights);
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(p), _mm256_extractf128_ps(p, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

// Rows [begin, end) for all tokens.
template <class V, class Args, class Rows>
class FloatProduct {
  using Floats = typename V::Floats;
  static constexpr int kVectors = kGroup / V::kWidth;
  static constexpr int kRegisters = V::kWidth * 2;  // that the instruction set has
  static constexpr int kRows = kRegisters / 8;  // rows and tokens that are multiplied at a time
  static constexpr int kTokens = 4;
  static constexpr int kRowTile = 16;  // rows that share a unit of activations as floats
  static constexpr int kTokenTile = 8;  // tokens that share a unit of weights as floats
  static constexpr int kDirect = kRegisters / (kRows * kVectors);  // tokens without such a unit

  using Unit = Floats[kUnitGroups * kVectors];
  using Sums = Floats[kRows][kVectors];

  const Args& args;
  const Rows& rows;
  const Units units;

 public:
  FloatProduct(const Args& arguments, const Rows& weights, int64_t ncols)
      : args(arguments), rows(weights), units(ncols) {}

  void multiply(int64_t begin, int64_t end) const {
    for (int64_t first = 0; first < args.m; first += kTokenTile) {
      const int tokens = int(args.m - first < kTokenTile ? args.m - first : kTokenTile);
      if (tokens <= kDirect) {
        with_element(args.x_type, [&](auto element) {
          multiply_directly<decltype(element), kDirect>(begin, end, first, tokens);
        });
      } else {
        for (int64_t row = begin; row < end; row += kRowTile) {
          multiply_tile(row, end, first, tokens);
        }
      }
    }
  }

 private:
  template <class Element>
  BCY_INLINE const typename Element::Storage* activations(int64_t token) const {
    return static_cast<const typename Element::Storage*>(args.x) + token * args.x_stride;
  }

  BCY_INLINE void store(int64_t token, int64_t row, const __m256* eights) const {
    const float sum = meet_eights(eights);
    with_element(args.y_type,
                 [&](auto element) { store_output<decltype(element)>(args, token, row, sum); });
  }

  template <class Element, int kT>
  BCY_INLINE void multiply_directly(int64_t begin, int64_t end, int64_t first, int tokens) const {
    if constexpr (kT > 1) {
      if (tokens < kT) return multiply_directly<Element, kT - 1>(begin, end, first, tokens);
    }
    const typename Element::Storage* x[kT];
    for (int t = 0; t < kT; ++t) x[t] = activations<Element>(first + t);
    for (int64_t row = begin; row < end; row += kRows) {
      __m256 eights[kT][kRows][kPartials];
      for (int p = 0; p < kPartials; ++p) {
        Sums sums[kT];
        rows.template multiply<kRows, kT, Element>(row, end, p, units, x, sums);
        for (int t = 0; t < kT; ++t) {
          for (int r = 0; r < kRows; ++r) eights[t][r][p] = V::fold(sums[t][r]);
        }
      }
      for (int t = 0; t < kT; ++t) {
        for (int r = 0; r < kRows && row + r < end; ++r) store(first + t, row + r, eights[t][r]);
      }
    }
  }

  // A unit of a token's activations.
  template <class Element>
  BCY_INLINE void load_activations(int64_t token, int64_t unit, Floats* x) const {
    const auto* from = activations<Element>(token) + unit * kUnit;
    const int vectors = units.groups(unit) * kVectors;
    for (int i = 0; i < vectors; ++i) x[i] = V::load(Element{}, from + i * V::kWidth);
  }

  // A unit of weights times that of kT tokens joins their sums, or begins them.
  template <int kT>
  static BCY_INLINE void add_unit(const Unit* x, const Unit* weights, int groups, bool fresh,
                                  Sums* sums) {
    constexpr int kFit = kRegisters / 2 / (kT * kRows);
    constexpr int kHeld = kFit < 1 ? 1 : kFit < kVectors ? kFit : kVectors;
    for (int i = 0; i < kVectors; i += kHeld) {
      Floats kept[kT][kRows][kHeld];
      for (int t = 0; t < kT; ++t) {
        for (int r = 0; r < kRows; ++r) {
          for (int h = 0; h < kHeld; ++h) kept[t][r][h] = fresh ? Floats{} : sums[t][r][i + h];
        }
      }
      for (int v = i; v < groups * kVectors; v += kVectors) {
        for (int h = 0; h < kHeld; ++h) {
          for (int r = 0; r < kRows; ++r) {
            for (int t = 0; t < kT; ++t) {
              kept[t][r][h] = V::fma(weights[r][v + h], x[t][v + h], kept[t][r][h]);
            }
          }
        }
      }
      for (int t = 0; t < kT; ++t) {
        for (int r = 0; r < kRows; ++r) {
          for (int h = 0; h < kHeld; ++h) sums[t][r][i + h] = kept[t][r][h];
        }
      }
    }
  }

  void multiply_tile(int64_t row, int64_t end, int64_t first, int tokens) const {
    const int count = int(end - row < kRowTile ? end - row : kRowTile);
    __m256 eights[kRowTile][kTokenTile][kPartials];
    for (int p = 0; p < kPartials; ++p) {
      Sums sums[kRowTile / kRows][kTokenTile];
      if (p >= units.count) memset(sums, 0, sizeof sums);
      for (int64_t unit = p; unit < units.count; unit += kPartials) {
        const int groups = units.groups(unit);
        Unit x[kTokenTile];
        with_element(args.x_type, [&](auto element) {
          for (int t = 0; t < tokens; ++t) {
            load_activations<decltype(element)>(first + t, unit, x[t]);
          }
        });
        for (int r = 0; r < count; r += kRows) {
          Unit weights[kRows];
          for (int i = 0; i < kRows; ++i) {
            const int64_t at = row + (r + i < count ? r + i : count - 1);
            rows.prefetch(at + kRowTile, unit);
            rows.dequantize(at, unit, groups, weights[i]);
          }
          Sums* const tile = sums[r / kRows];
          const bool fresh = unit == p;
          int t = 0;
          for (; t + kTokens <= tokens; t += kTokens) {
            add_unit<kTokens>(x + t, weights, groups, fresh, tile + t);
          }
          if (tokens & 2) {
            add_unit<2>(x + t, weights, groups, fresh, tile + t);
            t += 2;
          }
          if (tokens & 1) add_unit<1>(x + t, weights, groups, fresh, tile + t);
        }
      }
      for (int r = 0; r < count; ++r) {
        for (int t = 0; t < tokens; ++t) {
          eights[r][t][p] = V::fold(sums[r / kRows][t][r % kRows]);
        }
      }
    }
    for (int t = 0; t < tokens; ++t) {
      for (int r = 0; r < count; ++r) store(first + t, row + r, eights[r][t]);
    }
  }
};

}  // namespace
}  // namespace bcy::cpu
