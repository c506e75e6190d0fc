// SPDX-License-Identifier: Apache-2.0
// The block formats, sixteen (AVX-512) or eight (AVX2) blocks at a time, one in every vector lane.
//
// Lane p holds what lies at the same offset of unit p, dword by dword: unpacking codes and decoding
// scales is then the same few word operations for all lanes, and so is a dot product, since no sum
// ever crosses lanes. An Unpack<V, Format> over the dwords `d` of a unit gives, for group g of the
// unit:
//
//   kMax            largest unsigned code (value + kOffset)
//   chunks(g)       bit i: bytes 16 i to 16 i + 15 of the unit are looked at
//   codes<g>        the eight dwords of codes, in the places that layout.h gives them
//   excess(g)       codes carry a factor 2^excess (the format's 2^shift), where dot takes any byte
//                   and leaving them in their place saves instructions; only without a kOffset
//   scale<g>, half_scale<g>, minimum<g>, minima, minimum_scale   as in formats.h, the latter two of
//                   the unit
//
// V is an instruction set; see products.h. Lives in an unnamed namespace for the reason numeric.h
// gives.
#pragma once

#include "cpu/gguf/layout.h"

namespace bcy::cpu {
namespace {

constexpr uint32_t bytes_of(uint32_t byte) { return byte * 0x01010101u; }
constexpr uint32_t chunk_mask(int first_byte, int last_byte) {
  return (2u << last_byte / 16) - (1u << first_byte / 16);
}

// The byte or signed byte i of every dword.
template <int i, class Words>
BCY_INLINE Words byte_of(Words words) {
  if constexpr (i == 3) return words >> 24;
  return words >> 8 * i & 255u;
}
template <class V, int i>
BCY_INLINE typename V::Floats signed_byte(typename V::Words words) {
  return V::to_float(typename V::Ints(words << (24 - 8 * i)) >> 24);
}

// ---- formats of 32 elements, whose codes end the block ------------------------------------------

template <class V, class Format>
struct Block {
  using Words = typename V::Words;
  using Floats = typename V::Floats;
  using L = Layout<Format>;
  static constexpr int kWords = L::kCodeBytes / 4;

  static constexpr uint32_t chunks(int g) {
    return chunk_mask(Format::kBytes * g, Format::kBytes * (g + 1) - 1);
  }
  // Dword k of the codes as packed; the first one brings together what the rotation leaves at both
  // ends.
  template <int g, int k>
  static BCY_INLINE Words packed(const Words* d) {
    constexpr int first = (Format::kBytes * (g + 1) - L::kCodeBytes) / 4;
    constexpr int rotation = L::rotation(g);
    if constexpr (k > 0 || rotation == 0) return d[first + k];
    return V::template select<(1u << 8 * rotation) - 1>(d[first + kWords], d[first]);
  }
  template <int g>
  static BCY_INLINE void nibbles(const Words* d, Words* codes) {
    const Words p[] = {packed<g, 0>(d), packed<g, 1>(d), packed<g, 2>(d), packed<g, 3>(d)};
    for (int k = 0; k < 4; ++k) codes[k] = p[k] & bytes_of(15);
    for (int k = 0; k < 4; ++k) codes[k + 4] = p[k] >> 4 & bytes_of(15);
  }
  // The half at byte `at` of block g.
  template <int g, int at>
  static BCY_INLINE Floats half(const Words* d) {
    constexpr int byte = Format::kBytes * g + at;
    if constexpr (byte % 4 == 0) return V::half_to_float(d[byte / 4]);
    return V::half_to_float(d[byte / 4] >> 16);
  }
  template <int g>
  static BCY_INLINE Floats scale(const Words* d) {
    return half<g, 0>(d);
  }
  // The 32 bits at byte `at`, each half rotated as the codes are.
  template <int g, int at>
  static BCY_INLINE Words fifth_bits(const Words* d) {
    constexpr int byte = Format::kBytes * g + at;
    constexpr int rotation = L::rotation(g);
    Words bits = d[byte / 4];
    if constexpr (byte % 4 != 0) bits = bits >> 16 | d[byte / 4 + 1] << 16;
    if constexpr (rotation == 0) return bits;
    return V::template select<0x00010001u * ((1u << rotation) - 1)>(bits >> (16 - rotation),
                                                                    bits << rotation);
  }
  template <int g, int at>
  static BCY_INLINE void five_bits(const Words* d, Words* codes) {
    nibbles<g>(d, codes);
    const Words bits = fifth_bits<g, at>(d);
    add_sixteens<0>(codes, bits);
    add_sixteens<1>(codes, bits);
    add_sixteens<2>(codes, bits);
    add_sixteens<3>(codes, bits);
  }
  template <int byte>
  static BCY_INLINE void add_sixteens(Words* codes, Words bits) {
    const Words copies = V::template copy_byte<byte>(bits);
    codes[2 * byte] = V::template add_where<0x08040201u, 16>(codes[2 * byte], copies);
    codes[2 * byte + 1] = V::template add_where<0x80402010u, 16>(codes[2 * byte + 1], copies);
  }
  static constexpr int excess(int) { return 0; }
};

template <class V, class Format>
struct Unpack;

template <class V>
struct Unpack<V, Q4_0> : Block<V, Q4_0> {
  using Words = typename V::Words;
  static constexpr int kMax = 15;
  template <int g>
  static BCY_INLINE void codes(const Words* d, Words* codes) {
    Unpack::template nibbles<g>(d, codes);
  }
};

template <class V>
struct Unpack<V, Q4_1> : Block<V, Q4_1> {
  using Words = typename V::Words;
  static constexpr int kMax = 15;
  template <int g>
  static BCY_INLINE void codes(const Words* d, Words* codes) {
    Unpack::template nibbles<g>(d, codes);
  }
  template <int g>
  static BCY_INLINE typename V::Floats minimum(const Words* d, int) {
    return Unpack::template half<g, 2>(d);
  }
};

template <class V>
struct Unpack<V, Q5_0> : Block<V, Q5_0> {
  using Words = typename V::Words;
  static constexpr int kMax = 31;
  template <int g>
  static BCY_INLINE void codes(const Words* d, Words* codes) {
    Unpack::template five_bits<g, 2>(d, codes);
  }
};

template <class V>
struct Unpack<V, Q5_1> : Block<V, Q5_1> {
  using Words = typename V::Words;
  static constexpr int kMax = 31;
  template <int g>
  static BCY_INLINE void codes(const Words* d, Words* codes) {
    Unpack::template five_bits<g, 4>(d, codes);
  }
  template <int g>
  static BCY_INLINE typename V::Floats minimum(const Words* d, int) {
    return Unpack::template half<g, 2>(d);
  }
};

template <class V>
struct Unpack<V, Q8_0> : Block<V, Q8_0> {
  using Words = typename V::Words;
  static constexpr int kMax = 255;
  template <int g, int k = 0>
  static BCY_INLINE void codes(const Words* d, Words* codes) {
    codes[k] = Unpack::template packed<g, k>(d) ^ bytes_of(128);
    if constexpr (k < 7) Unpack::codes<g, k + 1>(d, codes);
  }
};

template <class V>
struct Unpack<V, IQ4_NL> : Block<V, IQ4_NL> {
  using Words = typename V::Words;
  static constexpr int kMax = 255;
  template <int g>
  static BCY_INLINE void codes(const Words* d, Words* codes) {
    Unpack::template nibbles<g>(d, codes);
    for (int k = 0; k < 8; ++k) codes[k] = V::look_up(iq4_table(), bytes_of(128), codes[k]);
  }
};

template <class V>
struct Unpack<V, MXFP4> : Block<V, MXFP4> {
  using Words = typename V::Words;
  static constexpr int kMax = 24;
  template <int g>
  static BCY_INLINE void codes(const Words* d, Words* codes) {
    Unpack::template nibbles<g>(d, codes);
    for (int k = 0; k < 8; ++k) codes[k] = V::look_up(e2m1_table(), bytes_of(12), codes[k]);
  }
  template <int g>
  static BCY_INLINE typename V::Floats scale(const Words* d) {
    const Words e = byte_of<MXFP4::kBytes * g % 4>(d[MXFP4::kBytes * g / 4]);
    const Words subnormal = (e << 21) + 0x00200000u;  // for e = 0 and 1
    return V::as_float(e < 2u ? subnormal : (e - 1u) << 23);
  }
};

// ---- formats of 256 elements --------------------------------------------------------------------

// Q4_K and Q5_K: d and dmin, then their packed scales.
template <class V, class Format>
struct KScales {
  using Words = typename V::Words;
  using Floats = typename V::Floats;
  template <int g>
  static BCY_INLINE Floats scale(const Words* d) {
    const Words sixes =
        g < 4 ? d[1] & bytes_of(63) : (d[3] & bytes_of(15)) | (d[1] >> 2 & bytes_of(48));
    return V::half_to_float(d[0]) * V::to_float(byte_of<g % 4>(sixes));
  }
  static BCY_INLINE void minima(const Words* d, Words* words) {
    words[0] = d[2] & bytes_of(63);
    words[1] = (d[3] >> 4 & bytes_of(15)) | (d[2] >> 2 & bytes_of(48));
  }
  static BCY_INLINE Floats minimum_scale(const Words* d) { return -V::half_to_float(d[0] >> 16); }
  template <int g>
  static BCY_INLINE Floats minimum(const Words* d, int) {
    Words words[2];
    minima(d, words);
    return minimum_scale(d) * V::to_float(byte_of<g % 4>(words[g / 4]));
  }
};

template <class V>
struct Unpack<V, Q4_K> : KScales<V, Q4_K> {
  using Words = typename V::Words;
  static constexpr int kMax = V::kAnyByte ? 240 : 15;
  static constexpr uint32_t chunks(int g) { return 1u | 6u << g / 2 * 2; }
  template <int g>
  static BCY_INLINE void codes(const Words* d, Words* codes) {
    for (int k = 0; k < 8; ++k) {
      const Words packed = d[4 + g / 2 * 8 + k];
      codes[k] = V::kAnyByte ? packed & bytes_of(15 << Q4_K::shift(g))
                             : packed >> Q4_K::shift(g) & bytes_of(15);
    }
  }
  static constexpr int excess(int g) { return V::kAnyByte ? Q4_K::shift(g) : 0; }
};

template <class V>
struct Unpack<V, Q5_K> : KScales<V, Q5_K> {
  using Words = typename V::Words;
  static constexpr int kMax = 31;
  static constexpr uint32_t chunks(int g) { return 7u | 24u << g / 2 * 2; }
  template <int g>
  static BCY_INLINE void codes(const Words* d, Words* codes) {
    for (int k = 0; k < 8; ++k) {
      const Words low = d[12 + g / 2 * 8 + k] >> 4 * (g & 1);
      const Words high = g < 4 ? d[4 + k] << (4 - g) : d[4 + k] >> (g - 4);
      codes[k] = V::template select<bytes_of(15)>(low, high) & bytes_of(31);
    }
  }
  static constexpr int excess(int) { return 0; }
};

template <class V>
struct Unpack<V, Q2_K> {
  using Words = typename V::Words;
  using Floats = typename V::Floats;
  static constexpr int kMax = V::kAnyByte ? 192 : 3;
  static constexpr uint32_t chunks(int g) { return 33u | 6u << g / 4 * 2; }
  template <int g>
  static BCY_INLINE void codes(const Words* d, Words* codes) {
    for (int k = 0; k < 8; ++k) {
      const Words packed = d[4 + g / 4 * 8 + k];
      codes[k] = V::kAnyByte ? packed & bytes_of(3 << Q2_K::shift(g))
                             : packed >> Q2_K::shift(g) & bytes_of(3);
    }
  }
  static constexpr int excess(int g) { return V::kAnyByte ? Q2_K::shift(g) : 0; }
  template <int g>
  static BCY_INLINE Floats scale(const Words* d) {
    return V::half_to_float(d[20]);
  }
  template <int g, int half>
  static BCY_INLINE Floats half_scale(const Words* d) {
    return V::to_float(byte_of<(2 * g + half) % 4>(d[g / 2] & bytes_of(15)));
  }
  static BCY_INLINE void minima(const Words* d, Words* words) {
    for (int i = 0; i < 4; ++i) words[i] = d[i] >> 4 & bytes_of(15);
  }
  static BCY_INLINE Floats minimum_scale(const Words* d) { return -V::half_to_float(d[20] >> 16); }
  template <int g>
  static BCY_INLINE Floats minimum(const Words* d, int half) {
    Words words[4];
    minima(d, words);
    const Words fours = words[g / 2];
    return minimum_scale(d) *
           V::to_float(half == 0 ? byte_of<2 * g % 4>(fours) : byte_of<2 * g % 4 + 1>(fours));
  }
};

template <class V>
struct Unpack<V, Q3_K> {
  using Words = typename V::Words;
  using Floats = typename V::Floats;
  static constexpr int kMax = 7;
  static constexpr uint32_t chunks(int g) { return 67u | 12u << g / 4 * 2; }
  template <int g>
  static BCY_INLINE void codes(const Words* d, Words* codes) {
    for (int k = 0; k < 8; ++k) {
      const Words low = d[8 + g / 4 * 8 + k] >> 2 * (g & 3);
      const Words high = g < 2 ? d[k] << (2 - g) : d[k] >> (g - 2);
      codes[k] = V::template select<bytes_of(3)>(low, high) & bytes_of(7);
    }
  }
  static constexpr int excess(int) { return 0; }
  template <int g>
  static BCY_INLINE Floats scale(const Words* d) {
    return V::half_to_float(d[27]);
  }
  template <int g, int half>
  static BCY_INLINE Floats half_scale(const Words* d) {
    constexpr int quarter = g / 2;
    const Words sixes = (d[24 + quarter % 2] >> 4 * (quarter / 2) & bytes_of(15)) |
                        (d[26] >> 2 * quarter & bytes_of(3)) << 4;
    return V::to_float(byte_of<(2 * g + half) % 4>(sixes)) - 32.0f;
  }
};

template <class V>
struct Unpack<V, Q6_K> {
  using Words = typename V::Words;
  using Floats = typename V::Floats;
  static constexpr int kMax = 63;
  static constexpr uint32_t chunks(int g) {
    return 3u << (g / 4 * 4 + (g & 1) * 2) | 0x300u << g / 4 * 2 | 0x3000u;
  }
  template <int g>
  static BCY_INLINE void codes(const Words* d, Words* codes) {
    constexpr int h = g / 4, j = g % 4;
    for (int k = 0; k < 8; ++k) {
      const Words low = d[16 * h + 8 * (j & 1) + k] >> 4 * (j / 2);
      const Words packed = d[32 + 8 * h + k];
      const Words high = j < 2 ? packed << (4 - 2 * j) : packed >> (2 * j - 4);
      codes[k] = V::template select<bytes_of(15)>(low, high) & bytes_of(63);
    }
  }
  static constexpr int excess(int) { return 0; }
  template <int g>
  static BCY_INLINE Floats scale(const Words* d) {
    return V::half_to_float(d[52]);
  }
  template <int g, int half>
  static BCY_INLINE Floats half_scale(const Words* d) {
    return signed_byte<V, (2 * g + half) % 4>(d[48 + g / 2]);
  }
};

template <class V>
struct Unpack<V, Q8_K> {
  using Words = typename V::Words;
  static constexpr int kMax = 255;
  static constexpr uint32_t chunks(int g) { return 1u | chunk_mask(4 + 32 * g, 35 + 32 * g); }
  template <int g>
  static BCY_INLINE void codes(const Words* d, Words* codes) {
    for (int k = 0; k < 8; ++k) codes[k] = d[1 + 8 * g + k] ^ bytes_of(128);
  }
  static constexpr int excess(int) { return 0; }
  template <int g>
  static BCY_INLINE typename V::Floats scale(const Words* d) {
    return V::as_float(d[0]);
  }
};

template <class V>
struct Unpack<V, IQ4_XS> {
  using Words = typename V::Words;
  static constexpr int kMax = 255;
  static constexpr uint32_t chunks(int g) { return 1u | chunk_mask(8 + 16 * g, 23 + 16 * g); }
  template <int g>
  static BCY_INLINE void codes(const Words* d, Words* codes) {
    for (int k = 0; k < 8; ++k) {
      const Words nibbles = d[2 + 4 * g + k % 4] >> (k < 4 ? 0 : 4) & bytes_of(15);
      codes[k] = V::look_up(iq4_table(), bytes_of(128), nibbles);
    }
  }
  static constexpr int excess(int) { return 0; }
  template <int g>
  static BCY_INLINE typename V::Floats scale(const Words* d) {
    const Words low = d[1] >> 4 * g & 15u;
    const Words high = d[0] >> (16 + 2 * g) & 3u;
    return V::half_to_float(d[0]) * (V::to_float(low | high << 4) - 32.0f);
  }
};

}  // namespace
}  // namespace bcy::cpu
