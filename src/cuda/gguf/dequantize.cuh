// SPDX-License-Identifier: Apache-2.0
// y[n, k] = weight[n, k] as floats. A warp brings eight units, whose bytes follow each other, into
// shared memory in the widest pieces their boundary allows; there narrow loads at odd places cost
// little. Then it writes one unit after the other, eight values a lane: memory takes whole lines
// fastest.
#pragma once

#include <type_traits>

#include "baracuda/order.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/pack.cuh"
#include "cuda/common/ring.cuh"
#include "operations.h"

namespace bcy {

constexpr int kDequantizeWarps = 8;
constexpr int kDequantizeThreads = kDequantizeWarps * 32;
constexpr int kWarpUnits = 8;
constexpr int64_t kBlockUnits = kDequantizeWarps * kWarpUnits;

// What a copy moves at once.
template <int Bytes>
using PieceOf = std::conditional_t<
    Bytes == 16, uint4,
    std::conditional_t<Bytes == 4, uint32_t, std::conditional_t<Bytes == 2, uint16_t, uint8_t>>>;

// Four values of type Y to where they belong; at_once: to a boundary of as many bytes, and none is
// NaN.
template <class Y>
__device__ __forceinline__ void store_four(typename Y::Storage* to, const float (&values)[4],
                                           bool at_once) {
  if (!at_once) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = Y::round(values[i]);
  } else if constexpr (sizeof(*to) == 4) {
    *reinterpret_cast<float4*>(to) = {values[0], values[1], values[2], values[3]};
  } else {
    *reinterpret_cast<uint2*>(to) = {round_two(Y{}, values[0], values[1]),
                                     round_two(Y{}, values[2], values[3])};
  }
}

// Piece: bytes that are copied at once, on whose boundary every eight units lie. Alignment: of a
// block there. at_once: rows of y lie on boundaries of four values.
template <class Format, class Y, int Piece, int Alignment>
__global__ void __launch_bounds__(kDequantizeThreads)
    dequantize_kernel(const __grid_constant__ bcy_gguf_dequantize_args args, uint32_t row_units,
                      bool at_once) {
  constexpr int kMostBytes = kWarpUnits * kUnitBytes<Format>;
  constexpr int kPieces = (kMostBytes + 32 * Piece - 1) / (32 * Piece);
  constexpr int kBlockGroups = Format::kElements / kGroup;
  __shared__ __align__(16) uint8_t copies[kDequantizeWarps][(kMostBytes + 15) / 16 * 16];
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t units = uint32_t(args.nrows) * row_units;
  const int64_t bytes_of_row = row_bytes<Format>(args.ncols);
  const uint32_t first = (blockIdx.x * kDequantizeWarps + warp) * kWarpUnits;
  if (first >= units) return;
  const auto place = [&](uint32_t unit) {
    return unit / row_units * bytes_of_row + unit % row_units * int64_t{kUnitBytes<Format>};
  };
  const int64_t begin = place(first);
  const int64_t end =
      first + kWarpUnits < units ? place(first + kWarpUnits) : args.nrows * bytes_of_row;
  {
    using Type = PieceOf<Piece>;
    const auto* const from =
        reinterpret_cast<const Type*>(static_cast<const uint8_t*>(args.weight) + begin);
    auto* const to = reinterpret_cast<Type*>(copies[warp]);
    const uint32_t count = uint32_t(end - begin) / Piece, rest = uint32_t(end - begin) % Piece;
    constexpr int kAtOnce = kPieces < 8 ? kPieces : 8;
#pragma unroll
    for (int i = 0; i < kPieces; i += kAtOnce) {
      Type pieces[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const uint32_t at = lane + (i + j) * 32;
        if (at < count) pieces[j] = from[at];
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const uint32_t at = lane + (i + j) * 32;
        if (at < count) to[at] = pieces[j];
      }
    }
    // The matrix need not end on a boundary.
    if (lane < rest) {
      reinterpret_cast<uint8_t*>(to + count)[lane] =
          reinterpret_cast<const uint8_t*>(from + count)[lane];
    }
  }
  __syncwarp();

  // Of every unit a lane has words t and t + 4 of a group: nibbles keep them together.
  const int group = lane / 4, t = lane % 4;
  const uint32_t row = first / row_units;
  uint32_t unit = first % row_units;
  const uint32_t count = min(units - first, uint32_t{kWarpUnits});
  // Groups of a row's last unit: only formats whose blocks are groups have units that end early.
  const int last_groups = int(args.ncols - int64_t{row_units - 1} * kUnit) / kGroup;
  auto* y = static_cast<typename Y::Storage*>(args.y) + row * args.y_stride +
            int64_t{unit} * kUnit + group * kGroup + t * 4;
  const int64_t to_next_row = args.y_stride - int64_t{row_units - 1} * kUnit;
  const uint8_t* bytes = copies[warp];
#pragma unroll 1
  for (uint32_t i = 0; i < count; ++i) {
    const bool ends = ++unit == row_units;
    const int groups = kBlockGroups == 1 && ends ? last_groups : kUnitGroups;
    if (group < groups) {
      const Bytes<Alignment> block(bytes + group / kBlockGroups * Format::kBytes);
      const int in_block = group % kBlockGroups;
      const ValueScale first = value_scale<Format>(block, in_block, 0);
      const ValueScale second =
          halves_differ<Format> ? value_scale<Format>(block, in_block, 1) : first;
      float values[2][4];
      dequantize_word<Format>(block, in_block, 0, t, first, values[0]);
      dequantize_word<Format>(block, in_block, 1, t, second, values[1]);
      const bool fast = at_once && first.gives_numbers() && second.gives_numbers();
      store_four<Y>(y, values[0], fast);
      store_four<Y>(y + 16, values[1], fast);
    }
    bytes += kBlockGroups == 1 ? groups * Format::kBytes : kUnitBytes<Format>;
    y += ends ? to_next_row : kUnit;
    if (ends) unit = 0;
  }
}

template <class Format>
int GgufOperations<Format>::dequantize(const bcy_gguf_dequantize_args& args, cudaStream_t stream) {
  const int64_t row_units = ceil_div(args.ncols, kUnit);
  // Units are counted in 32 bits: enough for 10^12 values.
  if (args.nrows > (UINT32_MAX - kBlockUnits) / row_units) return BCY_ERROR_TOO_LARGE;
  const int64_t blocks = ceil_div(args.nrows * row_units, kBlockUnits);
  const bool aligned =
      reinterpret_cast<uintptr_t>(args.weight) % 16 == 0 && args.ncols % kUnit == 0;
  return with_element(args.y_type, [&](auto y) {
    using Y = decltype(y);
    constexpr int kAny = Format::kAlignment;
    constexpr int kAligned = greatest_power_of_two_in(Format::kBytes, 4);
    auto* kernel = aligned ? dequantize_kernel<Format, Y, 16, kAligned>
                           : dequantize_kernel<Format, Y, kAny, kAny>;
    constexpr int kFour = 4 * sizeof(typename Y::Storage);
    const bool at_once = reinterpret_cast<uintptr_t>(args.y) % kFour == 0 && args.y_stride % 4 == 0;
    return launch(kernel, dim3(unsigned(blocks)), dim3(kDequantizeThreads), stream, 0, false, args,
                  uint32_t(row_units), at_once);
  });
}

}  // namespace bcy
