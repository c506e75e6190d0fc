// SPDX-License-Identifier: Apache-2.0
// The operations in plain C++: what they are by definition, for any layout, block size and K.
//
// Included by sources for several instruction sets, so all is forced inline or in an unnamed
// namespace, as numeric.h explains.
#pragma once

#include "baracuda/block_codes.h"
#include "baracuda/order.cuh"
#include "cpu/elements.h"
#include "cpu/nf4/kernels.h"

namespace bcy::cpu::nf4 {
namespace {

constexpr int kTokenTile = 8;  // tokens that share dequantized weights

BCY_INLINE float absmax_at(const bcy_nf4_weight& weight, int64_t block) {
  if (!weight.nested_absmax) return static_cast<const float*>(weight.absmax)[block];
  const float value = weight.nested_code[static_cast<const uint8_t*>(weight.absmax)[block]];
  return add(mul(value, weight.nested_absmax[block / weight.nested_block]), weight.nested_offset);
}

BCY_INLINE int code_at(const bcy_nf4_weight& weight, int64_t row, int64_t k) {
  const auto* const codes = static_cast<const uint8_t*>(weight.codes);
  if (weight.layout == BCY_ROW_PAIR) {
    return codes[row / 2 * weight.ncols + k] >> (row % 2 ? 4 : 0) & 15;
  }
  const int64_t i = row * weight.ncols + k;
  return codes[i / 2] >> (i % 2 ? 0 : 4) & 15;
}

// `count` values by codebook, from element `first` of the matrix as one row on, times their absmax.
BCY_INLINE void scale_plainly(const bcy_nf4_weight& weight, int64_t first, int count,
                              float* values) {
  int64_t block = first / weight.block_size;
  int64_t left = weight.block_size - first % weight.block_size;
  for (int i = 0; i < count; ++block, left = weight.block_size) {
    const float absmax = absmax_at(weight, block);
    const int end = left < count - i ? i + int(left) : count;
    for (; i < end; ++i) values[i] = mul(values[i], absmax);
  }
}

// Elements [k, k + count) of a row.
BCY_INLINE void dequantize_plainly(const bcy_nf4_weight& weight, int64_t row, int64_t k, int count,
                                   float* values) {
  const float* const codebook = codebook_of(weight.codebook)->values;
  for (int i = 0; i < count; ++i) values[i] = codebook[code_at(weight, row, k + i)];
  scale_plainly(weight, row * weight.ncols + k, count, values);
}

// The chunk of a row that begins at element k, in the order of order.cuh for codes.
struct PlainChunk {
  float values[kChunk] = {};
  float scale;
  int count;

  BCY_INLINE PlainChunk(const bcy_nf4_weight& weight, int64_t row, int64_t k)
      : count(int(weight.ncols - k < kChunk ? weight.ncols - k : kChunk)) {
    const float* const codebook = codebook_of(weight.codebook)->values;
    for (int i = 0; i < count; ++i) values[i] = codebook[code_at(weight, row, k + i)];
    const int64_t first = row * weight.ncols + k;
    scale = absmax_at(weight, first / weight.block_size);
    bool one = true;
    for (int64_t block = first / weight.block_size + 1;
         one && block <= (first + count - 1) / weight.block_size; ++block) {
      one = as_bits(absmax_at(weight, block)) == as_bits(scale);
    }
    if (one) return;
    scale_plainly(weight, first, count, values);
    scale = 1.0f;
  }

  BCY_INLINE float times(const float* x) const {
    float words[8];
    for (int i = 0; i < 8; ++i) words[i] = add_word(values + 8 * i, x + 8 * i);
    return mul(meet(words), scale);
  }
};

struct Plain {
  template <class Element>
  static void multiply_row(const bcy_nf4_matmul_args& args, int64_t row, int64_t first,
                           int tokens) {
    const int64_t ncols = args.weight.ncols;
    float sums[kTokenTile][kPartials] = {};
    for (int64_t unit = 0; unit * kUnit < ncols; ++unit) {
      float chunks[kTokenTile][kUnitChunks] = {};
      for (int c = 0; c < kUnitChunks && unit * kUnit + c * kChunk < ncols; ++c) {
        const int64_t k = unit * kUnit + c * kChunk;
        const PlainChunk chunk(args.weight, row, k);
        for (int t = 0; t < tokens; ++t) {
          const auto* const from =
              static_cast<const typename Element::Storage*>(args.x) + (first + t) * args.x_stride;
          float x[kChunk] = {};
          for (int i = 0; i < chunk.count; ++i) x[i] = Element::load(from + k + i);
          chunks[t][c] = chunk.times(x);
        }
      }
      for (int t = 0; t < tokens; ++t) {
        float& partial = sums[t][unit % kPartials];
        partial = add(partial, meet_chunks(chunks[t]));
      }
    }
    for (int t = 0; t < tokens; ++t) {
      const float sum = meet(sums[t]);
      with_element(args.y_type, [&](auto element) {
        store_output<decltype(element)>(args, first + t, row, sum);
      });
    }
  }

  static void matmul(const bcy_nf4_matmul_args& args, int64_t begin, int64_t end) {
    with_element(args.x_type, [&](auto element) {
      for (int64_t first = 0; first < args.m; first += kTokenTile) {
        const int tokens = int(args.m - first < kTokenTile ? args.m - first : kTokenTile);
        for (int64_t row = begin; row < end; ++row) {
          multiply_row<decltype(element)>(args, row, first, tokens);
        }
      }
    });
  }

  static void dequantize(const bcy_nf4_dequantize_args& args, int64_t begin, int64_t end) {
    with_element(args.y_type, [&](auto element) {
      using Element = decltype(element);
      for (int64_t row = begin; row < end; ++row) {
        auto* const y = static_cast<typename Element::Storage*>(args.y) + row * args.y_stride;
        const int64_t ncols = args.weight.ncols;
        for (int64_t k = 0; k < ncols; k += kUnit) {
          float values[kUnit];
          const int count = int(ncols - k < kUnit ? ncols - k : kUnit);
          dequantize_plainly(args.weight, row, k, count, values);
          for (int i = 0; i < count; ++i) y[k + i] = Element::round(values[i]);
        }
      }
    });
  }

  // Codes of `count` values scaled to [-1, 1]; the half of a byte that is left takes the code of 0.
  static BCY_INLINE void pack(const Codebook& codebook, float* scaled, int count, uint8_t* codes) {
    if (count % 2 != 0) scaled[count] = 0.0f;
    int32_t above[kGroup] = {};  // thresholds; NaN is at or below none
    for (const float threshold : codebook.thresholds) {
      for (int i = 0; i < kGroup; ++i) above[i] += !(scaled[i] <= threshold);
    }
    for (int i = 0; i < count; i += 2) {
      codes[i / 2] = uint8_t(codebook.codes[above[i]] << 4 | codebook.codes[above[i + 1]]);
    }
  }

  template <class Element>
  static void quantize_block(const bcy_nf4_quantize_args& args, int64_t block) {
    const Codebook& codebook = *codebook_of(args.codebook);
    const int64_t first = block * args.block_size;
    const bool full = args.count - first >= args.block_size;
    const int64_t count = full ? args.block_size : args.count - first;
    const auto* const x = static_cast<const typename Element::Storage*>(args.x) + first;
    int32_t largest = 0;  // bits, whose order is that of magnitudes, NaN above infinity
    for (int64_t i = 0; i < count; ++i) {
      const int32_t magnitude = int32_t(as_bits(Element::load(x + i)) & 0x7fffffffu);
      largest = magnitude > largest ? magnitude : largest;
    }
    const BlockAbsmax absmax(uint32_t(largest), full);
    args.absmax[block] = absmax.stored;
    auto* const codes = static_cast<uint8_t*>(args.codes) + first / 2;
    for (int64_t i = 0; i < count; i += kGroup) {
      const int part = int(count - i < kGroup ? count - i : kGroup);
      float scaled[kGroup];
      for (int j = 0; j < part; ++j) scaled[j] = absmax.scale(Element::load(x + i + j));
      for (int j = part; j < kGroup; ++j) scaled[j] = 0.0f;
      pack(codebook, scaled, part, codes + i / 2);
    }
  }

  static void quantize(const bcy_nf4_quantize_args& args, int64_t begin, int64_t end) {
    with_element(args.x_type, [&](auto element) {
      for (int64_t block = begin; block < end; ++block) {
        quantize_block<decltype(element)>(args, block);
      }
    });
  }

  static constexpr Kernels kKernels = {matmul, dequantize, quantize};
};

}  // namespace
}  // namespace bcy::cpu::nf4
