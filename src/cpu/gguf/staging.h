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

template <class V, class Format>
struct Staging {
  using Floats = typename V::Floats;
  using Ints = typename V::Ints;
  using L = Layout<Format>;
  static constexpr int kVectors = kGroup / V::kWidth;

  struct Group {
    float scale;
    int8_t u[kGroup];
    uint32_t sums[2];  // int32 correction or float sum, for each half
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
    const GroupScale scale = group_scale(as_float(largest), largest < 0x7f800000u);
    Group group{scale.scale, {}, {}};
    int sums[2] = {};
    if (scale.inverse != 0.0f) {
      Ints totals[2] = {};
      for (int i = 0; i < kVectors; ++i) {
        // No clip: no magnitude exceeds the largest, whose code rounds to 127.
        const Ints codes = V::round(values[i] * scale.inverse);
        V::narrow(codes, group.u + i * V::kWidth);
        totals[i * V::kWidth / Format::kScaleElements] += codes;
      }
      for (int half = 0; half < L::kHalves; ++half) sums[half] = V::total(totals[half]);
    }
    for (int half = 0; half < L::kHalves; ++half) {
      group.sums[half] = Format::kMinima > 0 ? as_bits(staged_sum(scale, sums[half]))
                                             : uint32_t(-kOffset<Format> * sums[half]);
    }
    return group;
  }

  static BCY_INLINE void store(const Group& group, int rotation, int lane, uint8_t* record) {
    uint8_t rotated[kGroup];
    for (int start = 0; start < kGroup; start += L::kCodeBytes) {
      // Twice in a row: a window that starts elsewhere is the rotation.
      uint8_t twice[2 * L::kCodeBytes];
      memcpy(twice, group.u + start, L::kCodeBytes);
      memcpy(twice + L::kCodeBytes, group.u + start, L::kCodeBytes);
      memcpy(rotated + start, twice + L::kCodeBytes - rotation, L::kCodeBytes);
    }
    const uint8_t* const u =
        Format::kElements == kGroup ? rotated : reinterpret_cast<const uint8_t*>(group.u);
    for (int word = 0; word < kGroup / 4; ++word) {
      memcpy(record + word * 4 * kLanes + 4 * lane, u + 4 * word, 4);
    }
    memcpy(record + L::kScale + 4 * lane, &group.scale, 4);
    for (int half = 0; half < L::kHalves; ++half) {
      memcpy(record + L::kSum + 4 * (half * kLanes + lane), group.sums + half, 4);
    }
  }

  template <class Element>
  static void stage_token(const typename Element::Storage* x, int64_t ncols, uint8_t* record) {
    const Spans k(ncols);
    for (int64_t span = 0; span < k.spans; ++span) {
      for (int g = 0; g < kUnitGroups; ++g, record += L::kRecord) {
        for (int unit = 0; unit < k.lanes; ++unit) {
          const int64_t at = span * kSpan + unit * kUnit + g * kGroup;
          const Group group = at < ncols ? stage_group<Element>(x + at) : Group{};
          for (int lane = unit; lane < kLanes; lane += k.lanes) {
            store(group, L::rotation(g), lane, record);
          }
        }
      }
    }
  }

  static void stage(const bcy_gguf_matmul_args& args, int64_t begin, int64_t end) {
    with_element(args.x_type, [&](auto element) {
      using Element = decltype(element);
      const auto* const x = static_cast<const typename Element::Storage*>(args.x);
      const int64_t bytes = token_bytes<Format>(args.ncols);
      for (int64_t token = begin; token < end; ++token) {
        stage_token<Element>(x + token * args.x_stride, args.ncols,
                             static_cast<uint8_t*>(args.workspace) + token * bytes);
      }
    });
  }
};

}  // namespace
}  // namespace bcy::cpu
