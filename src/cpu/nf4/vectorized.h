// SPDX-License-Identifier: Apache-2.0
// The kernels of any instruction set V of rows.h.
#pragma once

#include "cpu/nf4/product.h"

namespace bcy::cpu::nf4 {
namespace {

template <class V>
struct Vectorized {
  static void matmul(const bcy_nf4_matmul_args& args, int64_t begin, int64_t end) {
    Product<V>(args).multiply(begin, end);
  }

  static void dequantize(const bcy_nf4_dequantize_args& args, int64_t begin, int64_t end) {
    const Rows<V> rows(args.weight);
    const Units units(args.weight.ncols);
    with_element(args.y_type, [&](auto element) {
      using Element = decltype(element);
      for (int64_t row = begin; row < end; ++row) {
        auto* y = static_cast<typename Element::Storage*>(args.y) + row * args.y_stride;
        for (int64_t unit = 0; unit < units.count; ++unit, y += kUnit) {
          constexpr int kVectors = kGroup / V::kWidth;
          typename V::Floats values[kUnitGroups * kVectors];
          rows.dequantize(row, unit, units.groups(unit), values);
          const int count = units.elements(unit);
          int i = 0;
          for (; i + V::kWidth <= count; i += V::kWidth) {
            V::store(Element{}, y + i, values[i / V::kWidth]);
          }
          if (i < count) {
            typename Element::Storage rest[V::kWidth];
            V::store(Element{}, rest, values[i / V::kWidth]);
            memcpy(y + i, rest, (count - i) * sizeof *y);
          }
        }
      }
    });
  }

  static constexpr Kernels kKernels = {matmul, dequantize, Plain::quantize};
};

}  // namespace
}  // namespace bcy::cpu::nf4
