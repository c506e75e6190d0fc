// SPDX-License-Identifier: Apache-2.0
// The operations in plain C++ over the format headers: for processors without the instruction sets
// that have kernels of their own, and the definition that those are tested against.
#include "cpu/gguf/layout.h"

namespace bcy::cpu {
namespace {

// kFine: of 24-bit activations.
template <class Format, bool kFine = false>
struct Baseline {
  using L = Layout<Format, kFine>;
  using Block = Bytes<Format::kAlignment>;

  static Block block_at(const void* weight, int64_t ncols, int64_t row, int64_t k) {
    return Block(static_cast<const uint8_t*>(weight) + row * row_bytes<Format>(ncols) +
                 k / Format::kElements * Format::kBytes);
  }
  static int group_at(int64_t k) { return int(k % Format::kElements / kGroup); }

  template <class Element>
  static void stage_token(const typename Element::Storage* x, int64_t ncols, uint8_t* token) {
    const Spans k_spans(ncols);
    [[maybe_unused]] float unit_sums[kLanes][L::kIntegerSums > 0 ? L::kIntegerSums : 1];
    for (int64_t step = 0; step < k_spans.spans * kUnitGroups; ++step) {
      uint8_t* const span = token + step / kUnitGroups * L::kSpanRecords;
      uint8_t* const record = span + step % kUnitGroups * L::kRecord;
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t unit = step / kUnitGroups * kLanes + lane % k_spans.lanes;
        const int group = int(step % kUnitGroups);
        const int64_t k = unit * kUnit + group * kGroup;
        GroupScale scale{0.0f, 0.0f};
        int32_t u[kGroup] = {};
        int sums[2] = {};
        if (k < ncols) {
          float values[kGroup];
          float largest = 0.0f;
          bool finite = true;
          for (int e = 0; e < kGroup; ++e) {
            values[e] = Element::load(x + k + e);
            finite &= is_finite(values[e]);
            const float magnitude = as_float(as_bits(values[e]) & 0x7fffffffu);
            if (magnitude > largest) largest = magnitude;
          }
          scale = kFine ? binary_scale<kFineBits>(largest, finite) : group_scale(largest, finite);
          for (int e = 0; e < kGroup; ++e) {
            const int code =
                kFine ? fine_element(values[e], scale) : stage_element(values[e], scale);
            u[L::place(group, e)] = code;
            sums[e / Format::kScaleElements] += code;
          }
        }
        for (int word = 0; word < kGroup / 4; ++word) {
          if constexpr (kFine) {
            put_fine(u + 4 * word, record, word, lane);
          } else {
            for (int i = 0; i < 4; ++i)
              record[word * L::kWord + 4 * lane + i] = uint8_t(u[4 * word + i]);
          }
        }
        memcpy(record + L::kScale + 4 * lane, &scale.scale, 4);
        if constexpr (L::kIntegerSums > 0) {
          constexpr int kOfGroup = L::kIntegerSums / kUnitGroups;
          for (int i = 0; i < kOfGroup; ++i) {
            unit_sums[lane][group * kOfGroup + i] = staged_sum(scale, sums[i]);
          }
          if (group == kUnitGroups - 1) put_unit_sums<L>(unit_sums[lane], span, lane);
        } else if constexpr (Format::kMinima > 0) {
          for (int half = 0; half < L::kHalves; ++half) {
            const float sum = staged_sum(scale, sums[half]);
            memcpy(record + L::kSum + 4 * (half * kLanes + lane), &sum, 4);
          }
        }
      }
    }
  }

  static void stage(const bcy_gguf_matmul_args& args, int64_t begin, int64_t end) {
    with_element(args.x_type, [&](auto element) {
      using Element = decltype(element);
      for (int64_t token = begin; token < end; ++token) {
        const auto* x = static_cast<const typename Element::Storage*>(args.x);
        stage_token<Element>(
            x + token * args.x_stride, args.ncols,
            static_cast<uint8_t*>(args.workspace) + token * token_bytes<L>(args.ncols));
      }
    });
  }

  // One group of a weight row, ready for any number of tokens.
  struct Group {
    int16_t codes[kGroup];
    float scale;
    int half_scales[2];
    float minima[2];

    Group(Block block, int group, int unit_group) {
      for (int word = 0; word < kGroup / 4; ++word) {
        const uint32_t four = Format::codes(block, group, word / 4, word % 4);
        for (int i = 0; i < 4; ++i) {
          codes[L::place(unit_group, 4 * word + i)] = int16_t(code_at<Format>(four, i, group));
        }
      }
      scale = Format::scale(block, group);
      for (int half = 0; half < L::kHalves; ++half) {
        if constexpr (L::kHalves == 2) half_scales[half] = half_scale<Format>(block, group, half);
        if constexpr (Format::kMinima > 0) minima[half] = Format::minimum(block, group, half);
      }
    }
  };

  static float add_step(float sum, const Group& group, const uint8_t* record, int lane) {
    float scale;
    memcpy(&scale, record + L::kScale + 4 * lane, 4);
    int64_t dots[L::kHalves] = {};
    for (int e = 0; e < kGroup; ++e) {
      const int32_t u = kFine ? fine_at(record, e / 4, lane, e % 4)
                              : int8_t(record[e / 4 * L::kWord + 4 * lane + e % 4]);
      dots[e / Format::kScaleElements] += int64_t{group.codes[e]} * u;
    }
    if constexpr (kFine) {
      for (int half = 0; half < L::kHalves; ++half) {
        float weight = group.scale;
        if constexpr (L::kHalves == 2) weight = mul(weight, float(group.half_scales[half]));
        sum = add_fine_group(sum, float(dots[half]), weight, scale);
      }
    } else {
      int64_t dot = dots[0];
      if constexpr (L::kHalves == 2) {
        dot = dot * group.half_scales[0] + dots[1] * group.half_scales[1];
      }
      sum = add_group(sum, float(dot), group.scale, scale);
    }
    if constexpr (Format::kMinima > 0 && L::kIntegerSums == 0) {
      for (int half = 0; half < L::kHalves; ++half) {
        float staged;
        memcpy(&staged, record + L::kSum + 4 * (half * kLanes + lane), 4);
        sum = add_minimum(sum, group.minima[half], staged);
      }
    }
    return sum;
  }

  // The integer minima of a block.
  static float add_minima(float sum, Block block, const uint8_t* span, int lane) {
    int dot = 0;
    for (int i = 0; i < L::kIntegerSums; ++i) {
      const uint8_t* const word = span + L::kUnitSums + (i / 4 * 2 * kLanes + lane) * 4 + i % 4;
      const int high = int8_t(word[0]), low = int8_t(word[4 * kLanes]);
      dot += byte_of(Format::minima(block, i / 4), i % 4) * (high * (1 << kLowSumBits) + low);
    }
    float scale;
    memcpy(&scale, span + L::kUnitScale + 4 * lane, 4);
    return add_unit_minima(sum, float(dot), Format::minimum_scale(block), scale);
  }

  static void matmul(const bcy_gguf_matmul_args& args, int64_t begin, int64_t end) {
    const int64_t token_stride = token_bytes<L>(args.ncols);
    for (int64_t first = 0; first < args.m; first += kTokenTile) {
      const int tokens = int(args.m - first < kTokenTile ? args.m - first : kTokenTile);
      const uint8_t* const staged =
          static_cast<const uint8_t*>(args.workspace) + first * token_stride;
      for (int64_t row = begin; row < end; ++row) {
        float sums[kTokenTile][kPartials] = {};
        for (int64_t k = 0; k < args.ncols; k += kGroup) {
          const int64_t unit = k / kUnit;
          const int unit_group = int(k % kUnit / kGroup);
          const int lane = int(unit % kLanes);
          const Block block = block_at(args.weight, args.ncols, row, k);
          const Group group(block, group_at(k), unit_group);
          const uint8_t* const span = staged + unit / kLanes * L::kSpanRecords;
          for (int t = 0; t < tokens; ++t) {
            float& sum = sums[t][lane];
            const uint8_t* const records = span + t * token_stride;
            sum = add_step(sum, group, records + unit_group * L::kRecord, lane);
            if constexpr (L::kIntegerSums > 0) {
              if (unit_group == kUnitGroups - 1) sum = add_minima(sum, block, records, lane);
            }
          }
        }
        with_element(args.y_type, [&](auto element) {
          for (int t = 0; t < tokens; ++t) {
            store_output<decltype(element)>(args, first + t, row, meet(sums[t]));
          }
        });
      }
    }
  }

  static void dequantize_group(Block block, int group, float values[kGroup]) {
    for (int word = 0; word < kGroup / 4; ++word) {
      const int half = word / 4;
      dequantize_word<Format>(block, group, half, word % 4, value_scale<Format>(block, group, half),
                              values + 4 * word);
    }
  }

  static void dequantize(const bcy_gguf_dequantize_args& args, int64_t begin, int64_t end) {
    with_element(args.y_type, [&](auto element) {
      using Element = decltype(element);
      for (int64_t row = begin; row < end; ++row) {
        auto* const y = static_cast<typename Element::Storage*>(args.y) + row * args.y_stride;
        for (int64_t k = 0; k < args.ncols; k += kGroup) {
          float values[kGroup];
          dequantize_group(block_at(args.weight, args.ncols, row, k), group_at(k), values);
          for (int e = 0; e < kGroup; ++e) y[k + e] = Element::round(values[e]);
        }
      }
    });
  }
};

template <class Format>
constexpr Kernels kKernels = {Baseline<Format>::stage, Baseline<Format>::matmul,
                              Baseline<Format, true>::stage, Baseline<Format, true>::matmul,
                              Baseline<Format>::dequantize};

}  // namespace

const Kernels* baseline_kernels(int32_t format) {
  return with_format<const Kernels*>(format, nullptr,
                                     [](auto of) { return &kKernels<decltype(of)>; });
}

}  // namespace bcy::cpu
