// SPDX-License-Identifier: Apache-2.0
// Packed weights as bytes: little-endian loads at an offset that is a constant where it is used,
// plus one that need not be. What is known of the alignment decides how many loads that takes.
#pragma once

#include "baracuda/numeric.h"

namespace bcy {

// Alignment: of `base`, a power of two; loads use up to 4. Variable offsets are multiples of 4.
template <int Alignment>
struct Bytes {
  static constexpr int kAlignment = Alignment;
  const uint8_t* base;
  int at;  // kept apart from base, so that its alignment is known to the compiler

  BCY_INLINE explicit Bytes(const uint8_t* bytes = nullptr, int offset = 0)
      : base(bytes), at(offset) {}
  BCY_INLINE Bytes operator+(int offset) const { return Bytes(base, at + offset); }
  // The same with an offset that is no constant, of which another alignment is known.
  template <int Other>
  BCY_INLINE Bytes<Other> moved(int offset) const {
    return Bytes<Other>(base + at + offset);
  }

  // Any type at a multiple of its size, where the alignment is as much.
  template <class Wide>
  BCY_INLINE Wide load(int offset) const {
    return *reinterpret_cast<const Wide*>(base + at + offset);
  }

  BCY_INLINE uint32_t load8(int offset) const { return base[at + offset]; }

  BCY_INLINE uint32_t load16(int offset) const {
    const int start = at + offset;
#ifdef __CUDA_ARCH__
    if (Alignment >= 2 && start % 2 == 0) {
      return *reinterpret_cast<const uint16_t*>(base + start);
    }
    return load8(offset) | load8(offset + 1) << 8;
#else
    uint16_t value;
    memcpy(&value, base + start, sizeof value);
    return value;
#endif
  }

  BCY_INLINE uint32_t load32(int offset, int variable) const {
    const int start = at + offset;
#ifdef __CUDA_ARCH__
    if (Alignment >= 4) {
      const auto* words = reinterpret_cast<const uint32_t*>(base + (start & ~3) + variable);
      if (start % 4 == 0) return words[0];
      return __byte_perm(words[0], words[1], 0x3210 + 0x1111 * (start & 3));
    }
    return load16(offset + variable) | load16(offset + variable + 2) << 16;
#else
    uint32_t value;
    memcpy(&value, base + start + variable, sizeof value);
    return value;
#endif
  }

  BCY_INLINE float load_half(int offset) const { return half_to_float(uint16_t(load16(offset))); }
};

}  // namespace bcy
