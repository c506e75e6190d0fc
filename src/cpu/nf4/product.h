// SPDX-License-Identifier: Apache-2.0
// Products of 4-bit weights with float activations, in the order of order.cuh for codes: the words
// of a unit go side by side in vectors, their elements one after the other.
#pragma once

#include "cpu/nf4/rows.h"
#include "cpu/vectors_avx2.h"

namespace bcy::cpu::nf4 {
namespace {

// Eight vectors of eight elements: element i of vector j becomes element j of vector i.
BCY_INLINE void transpose(__m256* rows) {
  __m256 a[8], b[8];
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}

template <class V>
class Product {
  using Floats = typename V::Floats;
  using Table = typename V::Table;
  static constexpr int kSets = kUnit / 8 / V::kWidth;  // vectors of words in a unit
  static constexpr int kTokens = V::kWidth / 4;  // that are multiplied at a time
  static constexpr int kManyTokens = 8;  // that pass while a tile of rows is in the caches
  static constexpr int kSlots = 16;  // units of activations that do
  static constexpr int kPairs = 64;  // pairs of rows, times tokens

  // A unit of activations or of values: element e of the words in set s.
  struct Unit {
    Floats elements[kSets][8];

    // Words of a chunk, eight elements each.
    BCY_INLINE void set_chunk(int chunk, __m256* words) {
      transpose(words);
      auto* const to = reinterpret_cast<float*>(elements[chunk * 8 / V::kWidth]);
      for (int e = 0; e < 8; ++e) {
        _mm256_storeu_ps(to + e * V::kWidth + chunk * 8 % V::kWidth, words[e]);
      }
    }
  };

  struct Values {
    const Unit& unit;
    template <int kElement>
    BCY_INLINE Floats get(int set) const {
      return unit.elements[set][kElement];
    }
  };
  // The same straight from the codes.
  struct Codes {
    const Table& table;
    typename V::Words words[kSets];

    BCY_INLINE Codes(const Table& values, const uint8_t* codes) : table(values) {
      for (int set = 0; set < kSets; ++set) words[set] = V::load_words(codes + set * 4 * V::kWidth);
    }
    template <int kElement>
    BCY_INLINE Floats get(int set) const {
      return V::template look_up<kElement / 2 * 8 + (kElement % 2 ? 0 : 4)>(table, words[set]);
    }
  };

  const bcy_nf4_matmul_args& args;
  const Rows<V> rows;
  const Units units;
  const Table table;

 public:
  explicit Product(const bcy_nf4_matmul_args& arguments)
      : args(arguments),
        rows(arguments.weight),
        units(arguments.weight.ncols),
        table(V::load_table(codebook_of(arguments.weight.codebook)->values)) {}

  // Rows [begin, end) for all tokens.
  void multiply(int64_t begin, int64_t end) const {
    for (int64_t first = 0; first < args.m; first += kManyTokens) {
      const int tokens = int(args.m - first < kManyTokens ? args.m - first : kManyTokens);
      const int tile = kPairs / tokens * 2;
      for (int64_t row = begin; row < end; row += tile) {
        multiply_tile(row, int(end - row < tile ? end - row : tile), first, tokens);
      }
    }
  }

 private:
  template <class Element>
  BCY_INLINE void load_activations(int64_t token, int64_t unit, Unit& x) const {
    using Storage = typename Element::Storage;
    const auto* from = static_cast<const Storage*>(args.x) + token * args.x_stride + unit * kUnit;
    const int elements = units.elements(unit);
    Storage filled_up[kUnit];
    if (elements != kUnit) {
      memset(filled_up, 0, sizeof filled_up);
      memcpy(filled_up, from, elements * sizeof *from);
      from = filled_up;
    }
    for (int chunk = 0; chunk < kUnitChunks; ++chunk) {
      __m256 words[8];
      for (int i = 0; i < 8; ++i) {
        words[i] = (__m256)Avx2Floats::load(Element{}, from + chunk * kChunk + i * 8);
      }
      x.set_chunk(chunk, words);
    }
  }

  // Chunk by chunk, as they are by definition.
  __attribute__((noinline)) void load_plainly(int64_t row, int64_t unit, Unit& values,
                                              float* scales) const {
    const int elements = units.elements(unit);
    for (int chunk = 0; chunk < kUnitChunks; ++chunk) {
      __m256 words[8] = {};
      scales[chunk] = 1.0f;
      if (chunk * kChunk < elements) {
        const PlainChunk plain(args.weight, row, unit * kUnit + chunk * kChunk);
        for (int i = 0; i < 8; ++i) words[i] = _mm256_loadu_ps(plain.values + 8 * i);
        scales[chunk] = plain.scale;
      }
      values.set_chunk(chunk, words);
    }
  }

  template <int kElement = 0>
  static BCY_INLINE void load_codes(const Codes& codes, Unit& values) {
    for (int set = 0; set < kSets; ++set) {
      values.elements[set][kElement] = codes.template get<kElement>(set);
    }
    if constexpr (kElement < 7) load_codes<kElement + 1>(codes, values);
  }

  // The values of a unit of a row, and the scales of its chunks. few: codes may stand for them,
  // which is faster for few tokens; then gives those.
  BCY_INLINE const uint8_t* load_unit(int64_t row, int64_t unit, bool few, uint8_t* packed,
                                      Unit& values, float* scales) const {
    if (!rows.has_units()) {
      load_plainly(row, unit, values, scales);
      return nullptr;
    }
    const int elements = units.elements(unit);
    const uint8_t* const codes = rows.codes_of(row, unit, elements, packed);
    float factors[kUnit / 8];
    const bool differ = rows.scales_of(row, unit, elements, scales, factors);
    if (few && !differ) return codes;
    load_codes(Codes(table, codes), values);
    if (differ) {
      for (int set = 0; set < kSets; ++set) {
        const Floats factor = V::load(F32{}, factors + set * V::kWidth);
        for (Floats& value : values.elements[set]) value *= factor;
      }
    }
    return nullptr;
  }

  // The sums of words, chunk by chunk, for each of kT tokens.
  template <int kT, class Source>
  static BCY_INLINE void add_words(const Source& source, const Unit* const* x,
                                   __m256* const* sums) {
    for (int set = 0; set < kSets; ++set) {
      Floats first[kT], second[kT];
      add_pairs<0, kT>(source, x, set, first);
      add_pairs<4, kT>(source, x, set, second);
      for (int t = 0; t < kT; ++t) {
        V::eights(first[t] + second[t], sums[t] + set * (V::kWidth / 8));
      }
    }
  }
  template <int kElement, int kT, class Source>
  static BCY_INLINE void add_pairs(const Source& source, const Unit* const* x, int set,
                                   Floats* sums) {
    const Floats values[4] = {
        source.template get<kElement>(set), source.template get<kElement + 1>(set),
        source.template get<kElement + 2>(set), source.template get<kElement + 3>(set)};
    for (int t = 0; t < kT; ++t) {
      const Floats* const e = x[t]->elements[set] + kElement;
      sums[t] =
          V::fma(values[1], e[1], values[0] * e[0]) + V::fma(values[3], e[3], values[2] * e[2]);
    }
  }

  // Two rows of a unit join the partial sums of all tokens, in elements 0 and 4.
  BCY_INLINE void add_unit(int64_t row, int64_t last, int64_t unit, const Unit* x, int step,
                           int tokens, __m256 (*sums)[kPartials]) const {
    alignas(32) float scales[2][kUnitChunks];
    __m256 words[kManyTokens][2][kUnitChunks];
    for (int i = 0; i < 2; ++i) {
      Unit values;
      uint8_t packed[kUnit / 2];
      const uint8_t* const codes = load_unit(row + i < last ? row + i : last, unit,
                                             tokens <= kTokens, packed, values, scales[i]);
      int t = 0;
      const auto add = [&](auto many) {
        constexpr int kT = decltype(many)::value;
        const Unit* of_tokens[kT];
        __m256* to[kT];
        for (int j = 0; j < kT; ++j) {
          of_tokens[j] = x + (t + j) * step;
          to[j] = words[t + j][i];
        }
        if (codes) {
          add_words<kT>(Codes(table, codes), of_tokens, to);
        } else {
          add_words<kT>(Values{values}, of_tokens, to);
        }
        t += kT;
      };
      while (t + kTokens <= tokens) add(std::integral_constant<int, kTokens>{});
      if (kTokens > 2 && tokens & 2) add(std::integral_constant<int, 2>{});
      if (tokens & 1) add(std::integral_constant<int, 1>{});
    }
    const __m256 scale = _mm256_load_ps(scales[0]);
    for (int t = 0; t < tokens; ++t) {
      __m256 sum = _mm256_mul_ps(meet_each(words[t][0]), scale);
      sum = _mm256_add_ps(sum, _mm256_permute_ps(sum, 0x4e));
      sum = _mm256_add_ps(sum, _mm256_permute_ps(sum, 0xb1));
      __m256& partial = sums[t][unit % kPartials];
      partial = _mm256_add_ps(partial, sum);
    }
  }

  void multiply_tile(int64_t row, int count, int64_t first, int tokens) const {
    __m256 sums[kPairs][kPartials];  // by pair of rows and token
    memset(sums, 0, sizeof sums);
    const int strip = kSlots / tokens;
    const int64_t last = row + count - 1;
    for (int64_t unit = 0; unit < units.count; unit += strip) {
      const int there = int(units.count - unit < strip ? units.count - unit : strip);
      Unit x[kSlots];  // by token and unit
      with_element(args.x_type, [&](auto element) {
        for (int t = 0; t < tokens; ++t) {
          for (int u = 0; u < there; ++u) {
            load_activations<decltype(element)>(first + t, unit + u, x[t * strip + u]);
          }
        }
      });
      for (int r = 0; r < count; r += 2) {
        auto* const of_rows = sums + r / 2 * tokens;
        for (int u = 0; u < there; ++u) {
          rows.prefetch(row + r + 2 <= last ? row + r + 2 : last, unit + u);
          rows.prefetch(row + r + 3 <= last ? row + r + 3 : last, unit + u);
          add_unit(row + r, last, unit + u, x + u, strip, tokens, of_rows);
        }
      }
    }
    for (int r = 0; r < count; r += 2) {
      for (int t = 0; t < tokens; ++t) {
        const __m256* const p = sums[r / 2 * tokens + t];
        float both[8];
        const auto add = [](__m256 a, __m256 b) { return _mm256_add_ps(a, b); };
        _mm256_storeu_ps(both, add(add(add(p[0], p[4]), add(p[2], p[6])),
                                   add(add(p[1], p[5]), add(p[3], p[7]))));
        with_element(args.y_type, [&](auto element) {
          using Element = decltype(element);
          store_output<Element>(args, first + t, row + r, both[0]);
          if (r + 1 < count) store_output<Element>(args, first + t, row + r + 1, both[4]);
        });
      }
    }
  }
};

}  // namespace
}  // namespace bcy::cpu::nf4
