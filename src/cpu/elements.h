// SPDX-License-Identifier: Apache-2.0
// Element types chosen at run time, and how a product is written.
//
// Included by sources for several instruction sets: all is forced inline, as numeric.h explains.
#pragma once

#include <stdint.h>

#include "baracuda/api.h"
#include "baracuda/numeric.h"

namespace bcy::cpu {

BCY_INLINE bool is_element(int32_t type) {
  return type == BCY_F32 || type == BCY_F16 || type == BCY_BF16;
}

// Calls function with the F32, F16 or BF16 that type names.
template <class Function>
BCY_INLINE void with_element(int32_t type, Function function) {
  switch (type) {
    case BCY_F32:
      return function(F32{});
    case BCY_F16:
      return function(F16{});
    case BCY_BF16:
      return function(BF16{});
  }
}

// One output of a product: bias, the only rounding, one NaN for all.
template <class Element, class Args>
BCY_INLINE void store_output(const Args& args, int64_t token, int64_t row, float sum) {
  using Storage = typename Element::Storage;
  if (args.bias) sum = add(sum, Element::load(static_cast<const Storage*>(args.bias) + row));
  static_cast<Storage*>(args.y)[token * args.y_stride + row] = Element::round(sum);
}

}  // namespace bcy::cpu
