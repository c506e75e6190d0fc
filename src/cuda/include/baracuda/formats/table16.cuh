// SPDX-License-Identifier: Apache-2.0
// Look-ups in a table of sixteen bytes, given as four little-endian words.
#pragma once

#include "baracuda/numeric.h"

namespace bcy {

struct Table16 {
  uint32_t words[4];
};

#ifdef __CUDACC__

// The same table in registers: a constant would be moved there again for each look-up, and what
// comes from another lane is none.
__device__ __forceinline__ Table16 in_registers(Table16 table) {
#pragma unroll
  for (int i = 0; i < 4; ++i) table.words[i] = __shfl_sync(~0u, table.words[i], 0);
  return table;
}

// The entries of both nibbles of four bytes, low and high by turns: bytes 0 and 1 in the first
// word, 2 and 3 in the second.
__device__ __forceinline__ uint2 look_up_by_turns(const Table16& table, uint32_t bytes) {
  // A byte permute picks four of eight bytes by nibbles of three bits: one for each half of the
  // table, then a choice between the two by the nibbles' top bits.
  const uint32_t select = bytes & 0x77777777u;
  const uint32_t choose = mask_and_flip(bytes >> 1, 0x44444444u, 0x32103210u);
  return {__byte_perm(__byte_perm(table.words[0], table.words[1], select),
                      __byte_perm(table.words[2], table.words[3], select), choose),
          __byte_perm(__byte_perm(table.words[0], table.words[1], select >> 16),
                      __byte_perm(table.words[2], table.words[3], select >> 16), choose >> 16)};
}

// The halves of a table so that an entry is the sum of what permute_or_fill makes of both: where
// one picks a byte, the other fills in 0 or -1.
BCY_INLINE constexpr Table16 in_two_addends(const Table16& table) {
  Table16 addends = {};
  for (int i = 0; i < 8; ++i) {
    const uint32_t first = table.words[i / 4] >> 8 * (i % 4) & 0xffu;
    const uint32_t second = table.words[2 + i / 4] >> 8 * (i % 4) & 0xffu;
    for (uint32_t tops = 0; tops < 4; ++tops) {
      const uint32_t a = first + tops / 2 & 0xffu, b = second + tops % 2 & 0xffu;
      if (a >> 7 != tops % 2 || b >> 7 != tops / 2) continue;
      addends.words[i / 4] |= a << 8 * (i % 4);
      addends.words[2 + i / 4] |= b << 8 * (i % 4);
      break;
    }
  }
  return addends;
}

// What look_up_by_turns gives, as two addends: fewer instructions where sums are taken
// anyway.
struct TurnsInAddends {
  uint2 first;
  uint2 second;
};
__device__ __forceinline__ TurnsInAddends look_up_in_addends(const Table16& addends,
                                                             uint32_t bytes) {
  const uint32_t other = bytes ^ 0x88888888u;
  return {{permute_or_fill(addends.words[0], addends.words[1], bytes),
           permute_or_fill(addends.words[0], addends.words[1], bytes >> 16)},
          {permute_or_fill(addends.words[2], addends.words[3], other),
           permute_or_fill(addends.words[2], addends.words[3], other >> 16)}};
}

#endif

// The entries of the low (half 0) or the high nibble of four bytes, in their places.
BCY_INLINE uint32_t look_up_nibbles(const Table16& table, uint32_t bytes, int half) {
#ifdef __CUDA_ARCH__
  const uint2 turns = look_up_by_turns(table, bytes);
  return __byte_perm(turns.x, turns.y, half ? 0x7531 : 0x6420);
#else
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = bytes >> (8 * i + 4 * half) & 15u;
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
