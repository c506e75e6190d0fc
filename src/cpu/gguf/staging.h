// SPDX-License-Identifier: Apache-2.0
// Float activations to the records of layout.h, for any instruction set V (see products.h), which
// has besides
//
//   kWidth                    elements of Floats
//   load(Element, x)          kWidth activations as Floats
//   largest(ints), total(ints)
//   round(floats)             to integers, ties to even
//   narrow(ints, out)         to kWidth int8
#pragma once

#include "cpu/gguf/layout.h"

namespace bcy::cpu {
namespace {

template <class V, class Format, bool kFine = false>
struct Staging {
  using Floats = typename V::Floats;
  using Ints = typename V::Ints;
  using L = Layout<Format, kFine>;
  static constexpr int kVectors = kGroup / V::kWidth;

  using Code = std::conditional_t<kFine, int32_t, int8_t>;

  struct Group {
    float scale;
    Code u[kGroup];
    uint32_t sums[L::kSums > 0 ? L::kSums : 1];
    float unit_sums[L::kHalves];  // that become integers
  };

  template <class Element>
  static BCY_INLINE Group stage_group(const typename Element::Storage* x) {
    Floats values[kVectors];
    Ints magnitude{};
    for (int i = 0; i < kVectors; ++i) {
      values[i] = V::load(Element{}, x + i * V::kWidth);
      const Ints bits = Ints(values[i]) & 0x7fffffff;  // ordered as the magnitudes are, NaN last
      magnitude = bits > magnitude ? bits : magnitude;
    }
    const uint32_t largest = uint32_t(V::largest(magnitude));
    const bool finite = largest < 0x7f800000u;
    const GroupScale scale = kFine ? binary_scale<kFineBits>(as_float(largest), finite)
                                   : group_scale(as_float(largest), finite);
    Group group{scale.scale, {}, {}, {}};
    if (scale.inverse == 0.0f) return group;  // all zeros
    Ints totals[2] = {}, lows[2] = {};
    for (int i = 0; i < kVectors; ++i) {
      Ints codes = V::round(values[i] * scale.inverse);
      const int half = i * V::kWidth / Format::kScaleElements;
      if constexpr (kFine) {
        codes = codes < 0x7fffff ? codes : Ints{} + 0x7fffff;
        memcpy(group.u + i * V::kWidth, &codes, sizeof codes);
        lows[half] += codes & ((1 << kLowBits) - 1);
      } else {
        // No clip: no magnitude exceeds the largest, whose code rounds to 127.
        V::narrow(codes, group.u + i * V::kWidth);
      }
      totals[half] += codes;
    }
    for (int half = 0; half < L::kHalves; ++half) {
      const int sum = V::total(totals[half]);
      if constexpr (L::kIntegerSums > 0) {
        group.unit_sums[half] = staged_sum(scale, sum);
      } else if constexpr (Format::kMinima > 0) {
        group.sums[half] = as_bits(staged_sum(scale, sum));
      } else if constexpr (kFine) {
        const int low = V::total(lows[half]);
        group.sums[2 * half] = uint32_t(-kOffset<Format> * low);
        group.sums[2 * half + 1] = uint32_t(-kOffset<Format> * ((sum - low) >> kLowBits));
      } else {
        group.sums[half] = uint32_t(-kOffset<Format> * sum);
      }
    }
    return group;
  }

  static BCY_INLINE void store(const Group& group, int rotation, int lane, uint8_t* record) {
    auto rotated = group;
    if constexpr (Format::kElements == kGroup) {
      constexpr int kCount = L::kCodeBytes;
      for (int start = 0; start < kGroup; start += kCount) {
        // Twice in a row: a window that starts elsewhere is the rotation.
        Code twice[2 * kCount];
        memcpy(twice, group.u + start, sizeof twice / 2);
        memcpy(twice + kCount, group.u + start, sizeof twice / 2);
        memcpy(rotated.u + start, twice + kCount - rotation, sizeof twice / 2);
      }
    }
    for (int word = 0; word < kGroup / 4; ++word) {
      if constexpr (kFine) {
        put_fine(rotated.u + 4 * word, record, word, lane);
      } else {
        memcpy(record + word * L::kWord + 4 * lane, rotated.u + 4 * word, 4);
      }
    }
    memcpy(record + L::kScale + 4 * lane, &group.scale, 4);
    for (int i = 0; i < L::kSums; ++i) {
      memcpy(record + L::kSum + 4 * (i * kLanes + lane), group.sums + i, 4);
    }
  }

  template <class Element>
  static void stage_token(const typename Element::Storage* x, int64_t ncols, uint8_t* record) {
    const Spans k(ncols);
    for (int64_t span = 0; span < k.spans; ++span) {
      [[maybe_unused]] float unit_sums[kLanes][L::kIntegerSums > 0 ? L::kIntegerSums : 1];
      for (int g = 0; g < kUnitGroups; ++g) {
        for (int unit = 0; unit < k.lanes; ++unit) {
          const int64_t at = span * kSpan + unit * kUnit + g * kGroup;
          const Group group = at < ncols ? stage_group<Element>(x + at) : Group{};
          for (int lane = unit; lane < kLanes; lane += k.lanes) {
            store(group, L::rotation(g), lane, record + g * L::kRecord);
          }
          if constexpr (L::kIntegerSums > 0) {
            constexpr int kOfGroup = L::kIntegerSums / kUnitGroups;
            for (int i = 0; i < kOfGroup; ++i)
              unit_sums[unit][g * kOfGroup + i] = group.unit_sums[i];
          }
        }
      }
      if constexpr (L::kIntegerSums > 0) {
        for (int lane = 0; lane < kLanes; ++lane) {
          put_unit_sums<L>(unit_sums[lane % k.lanes], record, lane);
        }
      }
      record += L::kSpanRecords;
    }
  }

  static void stage(const bcy_gguf_matmul_args& args, int64_t begin, int64_t end) {
    with_element(args.x_type, [&](auto element) {
      using Element = decltype(element);
      const auto* const x = static_cast<const typename Element::Storage*>(args.x);
      const int64_t bytes = token_bytes<L>(args.ncols);
      for (int64_t token = begin; token < end; ++token) {
        stage_token<Element>(x + token * args.x_stride, args.ncols,
                             static_cast<uint8_t*>(args.workspace) + token * bytes);
      }
    });
  }
};

}  // namespace
}  // namespace bcy::cpu
