// SPDX-License-Identifier: Apache-2.0
// The product of one staged token with a row of weights to each lane.
//
// Tensor cores take eight tokens at a time, and four lanes each unpack the scales of a row for
// them. A single token takes half the instructions where a lane has the row to itself and
// multiplies four codes at a time: the integers of a group are exact either way, and the order in
// which groups are added is the same, so the bits are too.
#pragma once

#include "cuda/common/product.cuh"
#include "staged.cuh"

namespace bcy {

// Four codes times four activations.
template <bool UnsignedWeights>
__device__ __forceinline__ int dot_of_four(uint32_t codes, uint32_t x, int sum) {
  if constexpr (UnsignedWeights) return dot_of_unsigned(codes, x, sum);
  return __dp4a(int(codes), int(x), sum);
}

// A unit's bytes in registers, as Bytes: all offsets are constants where they are used.
struct WordBytes {
  const uint32_t* words;
  int at;

  __device__ __forceinline__ WordBytes operator+(int offset) const { return {words, at + offset}; }
  __device__ __forceinline__ uint32_t load32(int offset, int more) const {
    const int start = at + offset + more;
    const uint32_t* const word = words + start / 4;
    if (start % 4 == 0) return word[0];
    return __byte_perm(word[0], word[1], 0x3210 + 0x1111 * (start % 4));
  }
  __device__ __forceinline__ uint32_t load16(int offset) const {
    const int start = at + offset;
    if (start % 4 == 3) return load32(offset, 0) & 0xffffu;
    return words[start / 4] >> 8 * (start % 4) & 0xffffu;
  }
  __device__ __forceinline__ uint32_t load8(int offset) const {
    return words[(at + offset) / 4] >> 8 * ((at + offset) % 4) & 0xffu;
  }
  __device__ __forceinline__ float load_half(int offset) const {
    return half_to_float(uint16_t(load16(offset)));
  }
};

// 32 rows by one token, for a UnitRing.
template <class F>
class LaneTile {
 public:
  using Format = F;
  using Inputs = Staged;
  static constexpr int kTokens = 1;
  static constexpr int kRows = UnitRing<Format>::kRows;
  static constexpr int kBlocks = 2;

  static __device__ __forceinline__ void prefetch(const bcy_gguf_matmul_args&, const Staged&,
                                                  int64_t, int) {}
  static __device__ __forceinline__ void prepare(const bcy_gguf_matmul_args& args,
                                                 const Staged& staged, uint8_t* memory) {
    wait_for_previous_kernel();
    if (staged.fused) {
      stage_own_units<1, kMinima>(args, staged, memory);
    } else {
      copy_own_units<kMinima>(staged, memory);
    }
  }

  __device__ __forceinline__ LaneTile(const bcy_gguf_matmul_args&, const Staged&, int64_t, int64_t,
                                      int first_unit, const uint8_t* memory)
      : records_(memory + first_unit * Record::kBytes) {
    if constexpr (gives_turns<Format>) table_ = in_registers(in_two_parts(Format::table()));
  }

  __device__ __forceinline__ void clear(int64_t) { partial_ = 0.0f; }

  // row: of this lane, one unit.
  __device__ __forceinline__ void add_unit(const uint8_t* row, int round, int groups, int) {
    const uint8_t* const record = records_ + round * (kPartials * Record::kBytes);
    // Only formats whose blocks are groups have units that end early.
    if (kBlockGroups == 1 && groups < kUnitGroups) {
#pragma unroll 1
      for (int group = 0; group < groups; ++group) {
        const Activations x(record, group / 2);
        const Bytes<Format::kAlignment> block(row + group * Format::kBytes);
        if (group % 2 == 0) {
          add_group<0>(block, 0, x);
        } else {
          add_group<1>(block, 0, x);
        }
      }
      return;
    }
    uint32_t words[kWords];
    load_words(row, words);
    const auto block = [&](int group) {
      return WordBytes{words, group / kBlockGroups * Format::kBytes};
    };
#pragma unroll
    for (int group = 0; group < kUnitGroups; group += 2) {
      const Activations x(record, group / 2);
      add_group<0>(block(group), group % kBlockGroups, x);
      add_group<1>(block(group + 1), (group + 1) % kBlockGroups, x);
    }
  }

  __device__ __forceinline__ void store(float (&partials)[1][Meeting<kRows, 1>::kPitch]) const {
    partials[0][threadIdx.x % 32] = partial_;
  }

 private:
  using Record = StagedRecord<1, Format::kMinima>;
  static constexpr int kMinima = Format::kMinima;
  static constexpr int kBlockGroups = Format::kElements / kGroup;
  static constexpr bool kHalves = Format::kScaleElements == 16;
  static constexpr int kAlignment = UnitRing<Format>::kAlignment;
  static constexpr int kWords = (kUnitBytes<Format> + 3) / 4;

  // By loads as wide as the alignment of a unit allows.
  static __device__ __forceinline__ void load_words(const uint8_t* row, uint32_t (&words)[kWords]) {
    if constexpr (kAlignment == 16) {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        const uint4 piece = *reinterpret_cast<const uint4*>(row + 4 * i);
        words[i] = piece.x;
        words[i + 1] = piece.y;
        words[i + 2] = piece.z;
        words[i + 3] = piece.w;
      }
    } else if constexpr (kAlignment == 8) {
#pragma unroll
      for (int i = 0; i < kWords; i += 2) {
        const uint2 piece = *reinterpret_cast<const uint2*>(row + 4 * i);
        words[i] = piece.x;
        words[i + 1] = piece.y;
      }
    } else if constexpr (kAlignment == 4) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const uint32_t*>(row)[i];
    } else {
      const uint32_t odd = uint32_t(reinterpret_cast<uintptr_t>(row)) & 2;
      const uint32_t select = odd ? 0x5432 : 0x3210;
      const auto* const pairs = reinterpret_cast<const uint32_t*>(row - odd);
      uint32_t word = pairs[0];
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const uint32_t next = pairs[i + 1];
        words[i] = __byte_perm(word, next, select);
        word = next;
      }
    }
  }

  // Staged activations of two groups: words t and t + 4 of the first, then of the second.
  struct Activations {
    uint4 codes[4];
    float2 scales;
    float2 sums[kMinima > 0 ? kMinima : 1];

    __device__ __forceinline__ Activations(const uint8_t* record, int pair) {
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        codes[t] = reinterpret_cast<const uint4*>(record + pair * Record::kCodes)[t];
      }
      const auto floats = [&](int plane) {
        return *reinterpret_cast<const float2*>(record + plane);
      };
      scales = floats(Record::kScalesAt + pair * Record::kScales);
#pragma unroll
      for (int i = 0; i < kMinima; ++i) {
        sums[i] = floats(Record::kSumsAt + (pair * kMinima + i) * Record::kScales);
      }
    }
  };

  // Group g of a block times group Which of a pair.
  template <int Which, class Block>
  __device__ __forceinline__ void add_group(Block block, int g, const Activations& x) {
    const int shift = Format::shift(g);
    // An integer in the low mantissa bits of 1.5 * 2^(23 - shift), where every sum of a group fits.
    const float bias = as_float(0x4b400000u - (uint32_t(shift) << 23));
    int dots[2] = {kHalves ? 0 : int(as_bits(bias)), 0};
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      constexpr bool kUnsigned = Format::kUnsignedCodes;
      const uint32_t words[2] = {Which ? x.codes[t].z : x.codes[t].x,
                                 Which ? x.codes[t].w : x.codes[t].y};
      int& second = dots[kHalves ? 1 : 0];
      if constexpr (gives_turns<Format>) {
        const TurnsInParts codes = look_up_in_parts(table_, Format::nibbles(block, g, t));
        dots[0] = dot_of_four<kUnsigned>(codes.first.x, words[0], dots[0]);
        dots[0] = dot_of_four<kUnsigned>(codes.second.x, words[0], dots[0]);
        second = dot_of_four<kUnsigned>(codes.first.y, words[1], second);
        second = dot_of_four<kUnsigned>(codes.second.y, words[1], second);
      } else {
        dots[0] = dot_of_four<kUnsigned>(Format::codes(block, g, 0, t), words[0], dots[0]);
        second = dot_of_four<kUnsigned>(Format::codes(block, g, 1, t), words[1], second);
      }
    }
    float value;
    if constexpr (kHalves) {
      // Below 2^24 but for the factor 2^shift.
      const int dot =
          half_scale<Format>(block, g, 0) * dots[0] + half_scale<Format>(block, g, 1) * dots[1];
      value = mul(float(dot), as_float(uint32_t(127 - shift) << 23));
    } else {
      value = add(as_float(uint32_t(dots[0])), -bias);
    }
    const auto element = [](float2 two) { return Which ? two.y : two.x; };
    partial_ = fma(value, mul(Format::scale(block, g), element(x.scales)), partial_);
    if constexpr (kMinima > 0) {
#pragma unroll
      for (int half = 0; half < kMinima; ++half) {
        partial_ = add_minimum(partial_, Format::minimum(block, g, half), element(x.sums[half]));
      }
    }
  }

  const uint8_t* records_;  // of this warp's first unit
  Table16 table_;  // in two parts, of formats that have one
  float partial_ = 0.0f;
};

}  // namespace bcy
