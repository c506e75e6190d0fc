// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <type_traits>

#include "baracuda/instructions.cuh"
#include "baracuda/numeric.h"

namespace bcy {

// One result of a warp's product: words of the operands that hold its row and its column, of the
// four lanes that share them.
template <bool UnsignedWeights, bool UnsignedX>
inline int dot_of_lanes(const emulator::Operands* all, int row_lane, int row_word, int column_lane,
                        int column_word, int sum) {
  for (int t = 0; t < 4; ++t) {
    const uint32_t a = all[4 * row_lane + t].words[row_word];
    const uint32_t b = all[4 * column_lane + t].words[column_word];
    sum = dot_of_four<UnsignedWeights, UnsignedX>(a, b, sum);
  }
  return sum;
}

// Operands: words 0 to 3 as a, 4 and 5 as b; with Halves 1 only words 0, 1 and 4.
template <bool UnsignedWeights, bool UnsignedX, int Halves>
inline void mma_integers(int (&c)[4], const emulator::Operands& mine) {
  const emulator::Operands* const all = emulator::meet_warp("mma", 0, mine);
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    for (int half = 0; half < Halves; ++half) {
      c[i] = dot_of_lanes<UnsignedWeights, UnsignedX>(all, lane / 4, 2 * half + i / 2,
                                                      lane % 4 * 2 + i % 2, 4 + half, c[i]);
    }
  }
}

template <bool UnsignedWeights, bool UnsignedX = false>
inline void mma_half(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  mma_integers<UnsignedWeights, UnsignedX, 1>(c, {{a0, a1, 0, 0, b, 0}});
}
template <bool UnsignedWeights, bool UnsignedX = false>
inline void mma_group(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_integers<UnsignedWeights, UnsignedX, 2>(c, {{a[0], a[1], a[2], a[3], b[0], b[1]}});
}

// The sums are exact but for one rounding; tensor cores round more often.
template <class X>
inline void mma_floats(float (&c)[4], uint2 a, uint2 a8, uint32_t b, uint32_t b8) {
  const emulator::Operands* const all =
      emulator::meet_warp("mma", 0, {{a.x, a.y, a8.x, a8.y, b, b8}});
  const int lane = threadIdx.x % 32;
  const auto element = [](uint32_t word, int i) {
    const uint16_t bits = uint16_t(word >> 16 * i);
    return double(std::is_same_v<X, F16> ? half_to_float(bits) : bfloat16_to_float(bits));
  };
  for (int i = 0; i < 4; ++i) {
    double sum = c[i];
    for (int t = 0; t < 4; ++t) {
      const emulator::Operands& row = all[lane / 4 * 4 + t];
      const emulator::Operands& column = all[(lane % 4 * 2 + i % 2) * 4 + t];
      for (int half = 0; half < 2; ++half) {
        for (int j = 0; j < 2; ++j) {
          sum += element(row.words[2 * half + i / 2], j) * element(column.words[4 + half], j);
        }
      }
    }
    c[i] = float(sum);
  }
}

}  // namespace bcy
