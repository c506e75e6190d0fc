// SPDX-License-Identifier: Apache-2.0
// Products of staged activations, and of fine ones, for any instruction set V:
//
//   Words, Ints, Floats   GCC vectors of V::kRows * kLanes elements of 32 bits, first the lanes of
//                         row 0, then those of row 1
//   kAnyByte              dot takes any unsigned code; else small ones are faster
//   load_chunk            16 bytes from every lane, transposed to four vectors of dwords
//   half_to_float         of the low 16 bits of every dword
//   to_float, as_float    of signed integers; of bits
//   select<mask>(a, b)    bits of a where mask has ones, else of b
//   copy_byte<i>(w)       byte i of every dword to all four of its bytes
//   add_where<mask, n>    n to every byte of w whose bit of mask is set in the second argument
//   look_up               table[byte] + offset for every byte
//   dot<max, words, stride>   in every lane, dot product of codes up to max and u, every stride-th
//                         eight dwords, plus the correction
//   add_pairs(sum, a, p)  in every lane, the two halves of a times those at p join a sum
//   broadcast(p)          eight numbers, the same for every row
//   fma, fma_where        a * b + c, and c where the mask has no lane
//   meet(sums, out)       one sum for each row, in the order of meet() in order.cuh
#pragma once

#include <utility>

#include "cpu/gguf/unpack.h"

namespace bcy::cpu {
namespace {

// kFine: of fine records.
template <class V, class Format, bool kFine = false>
struct Product {
  using Words = typename V::Words;
  using Ints = typename V::Ints;
  using Floats = typename V::Floats;
  using U = Unpack<V, Format>;
  using L = Layout<Format, kFine>;
  static constexpr int kUnitBytes = L::kUnitBytes;
  static constexpr bool kFloatMinima = Format::kMinima > 0 && L::kIntegerSums == 0;
  // How far ahead weights are asked for, in bytes: lanes are read side by side, and the processor's
  // own prefetchers see no stream in that.
  static constexpr int64_t kPrefetch = 8 << 10;

  static constexpr uint32_t chunks_before(int group) {
    uint32_t seen = 0;
    for (int g = 0; g < group; ++g) seen |= U::chunks(g);
    return seen;
  }
  static constexpr int kChunks = 32 - __builtin_clz(chunks_before(kUnitGroups));
  static constexpr int kOverread = 16 * kChunks > kUnitBytes ? 16 * kChunks - kUnitBytes : 0;

  template <int g, int i = 0>
  static BCY_INLINE void load_chunks(const uint8_t* const* rows, Words* d) {
    if constexpr (i < kChunks) {
      constexpr bool kWanted = (U::chunks(g) & ~chunks_before(g)) >> i & 1u;
      if constexpr (kWanted) V::template load_chunk<kUnitBytes>(rows, 16 * i, d + 4 * i);
      load_chunks<g, i + 1>(rows, d);
    }
  }

  // What a group of weights is to all tokens.
  struct Group {
    Words codes[8];
    Floats scale;
    Floats half_scales[L::kHalves];  // fine: times the scale; else the codes' excess taken out
    Floats minima[L::kHalves];
  };

  static BCY_INLINE Floats finite_or_nan(Floats x) { return x + x * Floats{}; }
  static BCY_INLINE Floats scaled(Floats integers, Floats scale) {
    return V::fma(integers, scale, Floats{});
  }

  template <int g>
  static constexpr float kUnitCode = 1.0f / float(1 << U::excess(g));

  template <int g>
  static BCY_INLINE Group unpack(const Words* d) {
    Group group;
    U::template codes<g>(d, group.codes);
    group.scale = U::template scale<g>(d);
    if constexpr (!kFine) group.scale = finite_or_nan(group.scale);
    if constexpr (L::kHalves == 2) {
      const Floats factor = kFine ? group.scale : Floats{} + kUnitCode<g>;
      group.half_scales[0] = U::template half_scale<g, 0>(d) * factor;
      group.half_scales[1] = U::template half_scale<g, 1>(d) * factor;
    }
    if constexpr (kFloatMinima) {
      for (int half = 0; half < L::kHalves; ++half) {
        group.minima[half] = U::template minimum<g>(d, half);
      }
    }
    return group;
  }

  template <int kWords>
  static BCY_INLINE typename V::Ints dot(const Words* codes, const uint8_t* u,
                                         const uint8_t* correction) {
    return V::template dot<U::kMax, kWords>(codes, u, kOffset<Format> ? correction : nullptr);
  }

  // The exact dot product of codes and 24-bit integers, rounded to float32 once.
  template <int g, int kWords>
  static BCY_INLINE Floats fine_dot(const Words* codes, const uint8_t* x,
                                    const uint8_t* corrections) {
    Ints low[2] = {}, high[2] = {};
    if constexpr (kOffset<Format> != 0) {
      low[0] = (Ints)V::broadcast(corrections);
      high[0] = (Ints)V::broadcast(corrections + 4 * kLanes);
    }
    for (int k = 0; k < kWords; ++k, x += L::kWord) {
      const Words pairs[2] = {codes[k] & 0x00ff00ffu, codes[k] >> 8 & 0x00ff00ffu};
      for (int odd = 0; odd < 2; ++odd) {
        low[odd] = V::add_pairs(low[odd], pairs[odd], x + 4 * kLanes * odd);
        high[odd] = V::add_pairs(high[odd], pairs[odd], x + 4 * kLanes * (2 + odd));
      }
    }
    // Both parts are below 2^24 then.
    const Ints lower = low[0] + low[1], upper = high[0] + high[1] + (lower >> kLowBits);
    const Floats factor = Floats{} + float(1 << kLowBits);
    const Floats rest = V::to_float(lower & ((1 << kLowBits) - 1));
    return V::fma(V::to_float(upper), factor, rest) * kUnitCode<g>;
  }

  template <int g>
  static BCY_INLINE Floats add_products(Floats sum, const Group& group, const uint8_t* record,
                                        typename V::Mask mask) {
    const uint8_t* const extra = record + L::kSum;
    const Floats x_scale = V::broadcast(record + L::kScale);
    if constexpr (kFine) {
      constexpr int kWords = 8 / L::kHalves;
      for (int half = 0; half < L::kHalves; ++half) {
        const Floats value =
            fine_dot<g, kWords>(group.codes + kWords * half, record + kWords * L::kWord * half,
                                extra + 8 * kLanes * half);
        const Floats scale = L::kHalves == 2 ? group.half_scales[half] : group.scale;
        sum = V::fma_where(mask, value, scale * x_scale, sum);
      }
      return sum;
    }
    Floats dots;
    if constexpr (L::kHalves == 1) {
      dots = V::to_float(dot<8>(group.codes, record, extra) >> U::excess(g));
    } else {
      // Every sum here is an integer below 2^24, before the excess is taken out too. Starting from
      // +0 keeps a zero sum from being -0.
      const Floats first = V::to_float(dot<4>(group.codes, record, extra));
      const Floats second =
          V::to_float(dot<4>(group.codes + 4, record + 16 * kLanes, extra + 4 * kLanes));
      dots = V::fma(group.half_scales[0], first, Floats{});
      dots = V::fma(group.half_scales[1], second, dots);
    }
    return V::fma_where(mask, scaled(dots, group.scale), x_scale, sum);
  }

  template <int g>
  static BCY_INLINE Floats add_step(Floats sum, const Group& group, const uint8_t* record,
                                    typename V::Mask mask) {
    sum = add_products<g>(sum, group, record, mask);
    if constexpr (kFloatMinima) {
      const uint8_t* const extra = record + L::kSum;
      for (int half = 0; half < L::kHalves; ++half) {
        sum = V::fma_where(mask, group.minima[half], V::broadcast(extra + 4 * kLanes * half), sum);
      }
    }
    return sum;
  }

  // What the minima of a unit are to all tokens.
  struct Minima {
    static constexpr int kWords = L::kIntegerSums / 4;
    Words words[kWords];
    Floats scale;
  };
  static BCY_INLINE Minima unpack_minima(const Words* d) {
    Minima minima;
    U::minima(d, minima.words);
    minima.scale = finite_or_nan(U::minimum_scale(d));
    return minima;
  }

  static BCY_INLINE Floats add_minima(Floats sum, const Minima& minima, const uint8_t* span,
                                      typename V::Mask mask) {
    typename V::Ints parts[2];
    for (int part = 0; part < 2; ++part) {
      parts[part] = V::template dot<63, Minima::kWords, 2>(
          minima.words, span + L::kUnitSums + part * 4 * kLanes, nullptr);
    }
    const Floats dots = V::to_float((parts[0] << kLowSumBits) + parts[1]);
    return V::fma_where(mask, scaled(dots, minima.scale), V::broadcast(span + L::kUnitScale), sum);
  }

  // The lines of group g. The compiler would collect all prefetches of a span in one place, where
  // the processor drops what exceeds its queue.
  template <int g>
  static BCY_INLINE void prefetch(const uint8_t* unit) {
    asm volatile("" ::: "memory");
    for (int line = (g * kUnitBytes + 63) / 64 * 64; line < (g + 1) * kUnitBytes; line += 64) {
      __builtin_prefetch(unit + line);
    }
  }

  // A span of V::kRows rows. kOne: a single token, whose sums stay in a register.
  template <bool kOne, int g>
  static BCY_INLINE void add_group(Words* d, const uint8_t* const* rows,
                                   const uint8_t* const* upcoming, const uint8_t* staged,
                                   int64_t token_stride, int tokens, const uint8_t* masks,
                                   Floats* sums) {
    prefetch<g>(upcoming[0]);
    load_chunks<g>(rows, d);
    if constexpr (V::kRows == 2) prefetch<g>(upcoming[1]);
    const Group group = unpack<g>(d);
    const typename V::Mask mask = V::mask(masks[g]);
    const uint8_t* const record = staged + g * L::kRecord;
    for (int t = 0; t < (kOne ? 1 : tokens); ++t) {
      sums[t] = add_step<g>(sums[t], group, record + t * token_stride, mask);
    }
    if constexpr (L::kIntegerSums > 0 && g == kUnitGroups - 1) {
      const Minima minima = unpack_minima(d);
      for (int t = 0; t < (kOne ? 1 : tokens); ++t) {
        sums[t] = add_minima(sums[t], minima, staged + t * token_stride, mask);
      }
    }
  }
  template <bool kOne, int... g>
  static BCY_INLINE void add_span(const uint8_t* const* rows, const uint8_t* const* upcoming,
                                  const uint8_t* staged, int64_t token_stride, int tokens,
                                  const uint8_t* masks, Floats* sums,
                                  std::integer_sequence<int, g...>) {
    Words d[4 * kChunks];
    (add_group<kOne, g>(d, rows, upcoming, staged, token_stride, tokens, masks, sums), ...);
  }

  // Where a tile's lanes find their units when these do not follow each other in the matrix, or
  // when reading whole chunks would leave it.
  struct Copy {
    alignas(64) uint8_t bytes[V::kRows][kLanes * kUnitBytes + kOverread];
  };

  // Rows [begin, end) for `tokens` tokens from `first` on.
  template <bool kOne>
  static void multiply(const bcy_gguf_matmul_args& args, int64_t begin, int64_t end, int64_t first,
                       int tokens) {
    const Spans k(args.ncols);
    const int64_t stride = row_bytes<Format>(args.ncols);
    const uint8_t* const weight = static_cast<const uint8_t*>(args.weight);
    const uint8_t* const weight_end = weight + args.nrows * stride;
    const int64_t token_stride = token_bytes<L>(args.ncols);
    const uint8_t* const staged =
        static_cast<const uint8_t*>(args.workspace) + first * token_stride;
    const int64_t whole_spans = args.ncols / kSpan;
    const int set_rows = kLanes / k.lanes;  // rows that share eight lanes
    const int tile_rows = V::kRows * set_rows;
    const int64_t tile_bytes = tile_rows * stride;
    const int64_t ahead = (kPrefetch / (tile_bytes + 1) + 1) * tile_bytes;

    uint8_t all[kUnitGroups], existing[kUnitGroups];  // lanes that take part, in the last span
    for (int g = 0; g < kUnitGroups; ++g) {
      all[g] = 0xff;
      existing[g] = 0;
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t at = whole_spans * kSpan + lane % k.lanes * kUnit + g * kGroup;
        existing[g] |= uint8_t((at < args.ncols) << lane);
      }
    }
    Copy copy;
    bool clean = false;

    for (int64_t row = begin; row < end; row += tile_rows) {
      // Row i of set r; beyond the end the last one, whose sums are dropped.
      const auto weight_row = [=](int r, int i) {
        const int64_t at = row + r * set_rows + i;
        return weight + (at < end ? at : end - 1) * stride;
      };
      Floats sums[kOne ? 1 : kTokenTile];
      for (int t = 0; t < (kOne ? 1 : tokens); ++t) sums[t] = Floats{};
      for (int64_t span = 0; span < k.spans; ++span) {
        const int64_t offset = span * kLanes * kUnitBytes;
        const uint8_t* rows[V::kRows];
        const uint8_t* upcoming[V::kRows];
        const bool whole = span < whole_spans;
        bool in_place = whole;
        for (int r = 0; r < V::kRows; ++r) {
          rows[r] = weight_row(r, 0) + offset;
          upcoming[r] = rows[r] + ahead;
          in_place &= weight_end - rows[r] >= kLanes * kUnitBytes + kOverread;
        }
        if (!in_place) {
          if (!clean) memset(&copy, 0, sizeof copy);
          clean = true;
          const int64_t left = stride - offset;
          const int64_t room = int64_t(k.lanes) * kUnitBytes;
          for (int r = 0; r < V::kRows; ++r) {
            for (int i = 0; i < set_rows; ++i) {
              memcpy(copy.bytes[r] + i * room, weight_row(r, i) + offset,
                     size_t(left < room ? left : room));
            }
            rows[r] = copy.bytes[r];
          }
        }
        add_span<kOne>(rows, upcoming, staged + span * L::kSpanRecords, token_stride, tokens,
                       whole ? all : existing, sums,
                       std::make_integer_sequence<int, kUnitGroups>());
      }
      for (int t = 0; t < (kOne ? 1 : tokens); ++t) {
        float results[V::kRows * kLanes];
        meet_lanes(sums[t], k.lanes, results);
        with_element(args.y_type, [&](auto element) {
          for (int r = 0; r < tile_rows && row + r < end; ++r) {
            store_output<decltype(element)>(args, first + t, row + r, results[r]);
          }
        });
      }
    }
  }

  // The sum of each row.
  static BCY_INLINE void meet_lanes(Floats sums, int lanes, float* results) {
    if (lanes == kLanes) return V::meet(sums, results);
    float p[V::kRows * kLanes + kLanes];
    memcpy(p, &sums, sizeof sums);
    for (int r = 0; r < V::kRows * kLanes / lanes; ++r) {
      const float* const q = p + r * lanes;
      const float partials[kPartials] = {q[0], lanes > 1 ? q[1] : 0.0f, lanes > 2 ? q[2] : 0.0f,
                                         lanes > 2 ? q[3] : 0.0f};
      results[r] = meet(partials);
    }
  }

  static void matmul(const bcy_gguf_matmul_args& args, int64_t begin, int64_t end) {
    for (int64_t first = 0; first < args.m; first += kTokenTile) {
      const int64_t left = args.m - first;
      if (left == 1) {
        multiply<true>(args, begin, end, first, 1);
      } else {
        multiply<false>(args, begin, end, first, int(left < kTokenTile ? left : kTokenTile));
      }
    }
  }
};

}  // namespace
}  // namespace bcy::cpu
