// SPDX-License-Identifier: Apache-2.0
// IQ4_NL: d f16, qs[16]; value d table[q]; element j in the low nibble of qs[j], j + 16 in the high
// one.
#pragma once

#include "baracuda/bytes.h"
#include "baracuda/formats/table16.cuh"
#include "baracuda/numeric.h"

namespace bcy {

struct IQ4_NL {
  static constexpr int kId = 20, kElements = 32, kBytes = 18, kAlignment = 2;
  static constexpr int kScaleElements = 32, kMinima = 0;
  static constexpr bool kUnsignedCodes = false;

  template <class Block>
  static BCY_INLINE uint32_t codes(Block block, int, int half, int word) {
    return look_up_nibbles(iq4_table(), block.load32(2, 4 * word), half);
  }
#ifdef __CUDACC__
  template <class Block>
  static __device__ __forceinline__ uint2 codes_by_turns(Block block, int, int word) {
    return look_up_by_turns(iq4_table(), block.load32(2, 4 * word));
  }
#endif
  static BCY_INLINE constexpr int shift(int) { return 0; }
  template <class Block>
  static BCY_INLINE float scale(Block block, int) {
    return block.load_half(0);
  }
};

}  // namespace bcy
