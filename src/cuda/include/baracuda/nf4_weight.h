// SPDX-License-Identifier: Apache-2.0
// What both backends ask of a 4-bit weight.
#pragma once

#include "baracuda/api.h"
#include "baracuda/codebooks.h"

namespace bcy {

constexpr bool is_power_of_two(int n) { return n > 0 && (n & (n - 1)) == 0; }

// A bcy_status. On the host alone; forced inline, as numeric.h explains.
inline __attribute__((always_inline)) int check_weight(const bcy_nf4_weight& weight) {
  if (codebook_of(weight.codebook) == nullptr) return BCY_ERROR_UNKNOWN_FORMAT;
  int64_t count;
  bool valid = weight.nrows >= 0 && weight.ncols >= 0 && weight.block_size > 0 &&
               !__builtin_mul_overflow(weight.nrows, weight.ncols, &count);
  if (weight.nested_absmax != nullptr) {
    valid = valid && weight.nested_code != nullptr && is_power_of_two(weight.nested_block);
  }
  switch (weight.layout) {
    case BCY_BITSANDBYTES:
      valid = valid && weight.block_size >= 32 && is_power_of_two(weight.block_size);
      break;
    case BCY_ROW_PAIR:
      valid = valid && weight.nrows % 2 == 0 && weight.ncols % weight.block_size == 0;
      break;
    default:
      valid = false;
  }
  return valid ? BCY_OK : BCY_ERROR_INVALID_ARGUMENT;
}

}  // namespace bcy
