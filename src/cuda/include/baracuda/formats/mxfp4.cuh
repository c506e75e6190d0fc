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

  template <class Block>
  static BCY_INLINE uint32_t codes(Block block, int, int half, int word) {
    return look_up_nibbles(e2m1_table(), block.load32(1, 4 * word), half);
  }
#ifdef __CUDACC__
  template <class Block>
  static __device__ __forceinline__ uint2 codes_by_turns(Block block, int, int word) {
    return look_up_by_turns(e2m1_table(), block.load32(1, 4 * word));
  }
#endif
  static BCY_INLINE constexpr int shift(int) { return 0; }
  template <class Block>
  static BCY_INLINE float scale(Block block, int) {
    const uint32_t e = block.load8(0);
    return as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);  // below 2 the power is subnormal
  }
};

}  // namespace bcy
