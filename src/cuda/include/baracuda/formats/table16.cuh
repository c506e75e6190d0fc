// SPDX-License-Identifier: Apache-2.0
// Four look-ups in a table of sixteen bytes, given as four little-endian words.
#pragma once

#include "baracuda/numeric.h"

namespace bcy {

struct Table16 {
  uint32_t words[4];
};

// nibbles: four bytes of 0 to 15. Gives the four entries in their places.
BCY_INLINE uint32_t look_up(const Table16& table, uint32_t nibbles) {
#ifdef __CUDA_ARCH__
  // A byte permute picks four of eight bytes: one for each half of the table, then a choice by the
  // top bit.
  uint32_t selector = nibbles & 0x07070707u;
  selector = (selector | selector >> 4) & 0x00ff00ffu;
  selector = (selector | selector >> 8) & 0x0000ffffu;
  const uint32_t low = __byte_perm(table.words[0], table.words[1], selector);
  const uint32_t high = __byte_perm(table.words[2], table.words[3], selector);
  const uint32_t top = (nibbles >> 3 & 0x01010101u) * 0xffu;
  return (low & ~top) | (high & top);
#else
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = nibbles >> 8 * i & 15u;
    result |= (table.words[nibble / 4] >> 8 * (nibble % 4) & 0xffu) << 8 * i;
  }
  return result;
#endif
}

// -127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113
BCY_INLINE constexpr Table16 iq4_table() {
  return {{0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u}};
}

// Twice the values of E2M1: 0 1 2 3 4 6 8 12, then the same negated.
BCY_INLINE constexpr Table16 e2m1_table() {
  return {{0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu}};
}

}  // namespace bcy
