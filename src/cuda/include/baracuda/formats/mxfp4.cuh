// SPDX-License-Identifier: Apache-2.0
// MXFP4: e (E8M0), qs[16]; value 2^(e - 128) times twice the E2M1 value; nibbles as in Q4_0.
#pragma once

#include "baracuda/bytes.h"
#include "baracuda/formats/table16.cuh"
#include "baracuda/numeric.h"

namespace bcy {

struct MXFP4 {
  static constexpr int kId = 39, kElements = 32, kBytes = 17, kAlignment = 1;
  static constexpr int kScaleElements = 32, kMinima = 0;
  static constexpr bool kUnsignedCodes = false;

  static BCY_INLINE constexpr Table16 table() { return e2m1_table(); }
  template <class Block>
  static BCY_INLINE uint32_t nibbles(Block block, int, int word) {
    return block.load32(1, 4 * word);
  }
  template <class Block>
  static BCY_INLINE uint32_t codes(Block block, int group, int half, int word) {
    return look_up_nibbles(table(), nibbles(block, group, word), half);
  }
  static BCY_INLINE constexpr int shift(int) { return 0; }
  template <class Block>
  static BCY_INLINE float scale(Block block, int) {
    const uint32_t e = block.load8(0);
    return as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);  // below 2 the power is subnormal
  }
};

}  // namespace bcy
