// SPDX-License-Identifier: Apache-2.0
// What both products of 4-bit weights share: the scales of a lane's rows.
//
// With r = lane / 4 and t = lane % 4 a lane holds rows r, r + 8, r + 16, ... and word t of each
// group, its elements 8 t .. 8 t + 7.
#pragma once

#include "cuda/common/product.cuh"
#include "lookup.cuh"
#include "weight.cuh"

namespace bcy {

struct Nf4Inputs {
  Scales scales;
  int shift;  // blocks are 2^shift chunks
  CodeWords codes;
  float unit = 1.0f;  // what the codes stand for, over what they are in `codes`
};

// Describes the scales of a row's units to the copy engine, in boxes of four by `rows`, if they are
// a float32 for each chunk at places that it can copy.
inline int describe_scales(const ProductArgs& args, const Nf4Inputs& inputs, int rows,
                           CUtensorMap& scales, bool& boxed) {
  const void* const absmax = inputs.scales.absmax;
  boxed = inputs.scales.nested_absmax == nullptr && inputs.shift == 0 && args.ncols % kUnit == 0 &&
          reinterpret_cast<uintptr_t>(absmax) % 16 == 0;
  if (!boxed) return BCY_OK;
  return describe_plain_boxes(absmax, args.ncols / kChunk * int64_t(sizeof(float)), args.nrows,
                              kUnitChunks * int(sizeof(float)), rows, true, scales);
}

// The scales of a unit in chunks of Chunk elements: lane t has those of chunks t, t + 4, ... of its
// rows. The loads of a unit are under way while the one before it is multiplied.
template <int Rows, int Chunk>
class UnitScales {
 public:
  __device__ __forceinline__ UnitScales(const ProductArgs& args, const Nf4Inputs& inputs,
                                        int64_t first_row, int first_unit)
      : nrows_(args.nrows),
        in_row_(int(args.ncols / Chunk)),
        first_(first_unit * kChunks + threadIdx.x % 4),
        row_(first_row) {
    load(inputs, row_, 0);
  }

  // The scales of the unit that was loaded; starts to load the one that is `next` rounds after the
  // first, of these rows or of those from `following` on.
  __device__ __forceinline__ void take(const Nf4Inputs& inputs, int round, int next,
                                       int64_t following) {
#pragma unroll
    for (int i = 0; i < Rows / 8; ++i) {
#pragma unroll
      for (int j = 0; j < kOwn; ++j)
        scales_[i][j] = mul(inputs.scales.decode(loaded_[i][j]), inputs.unit);
    }
    if (next <= round) row_ = following;
    load(inputs, row_, next);
  }

  // Of row r + 8 i in a chunk.
  __device__ __forceinline__ float operator()(int i, int chunk) const {
    return __shfl_sync(~0u, own(i, chunk), (threadIdx.x & 28) + chunk % 4);
  }
  // The same in lanes t = chunk % 4 alone. Where a lane has one scale a row it needs no index,
  // which a loop that is not unrolled could not give to registers.
  __device__ __forceinline__ float own(int i, int chunk) const {
    return scales_[i][kOwn == 1 ? 0 : chunk / 4];
  }

  // Asks for the scales of a round of the eight warps.
  static __device__ __forceinline__ void prefetch(const ProductArgs& args, const Nf4Inputs& inputs,
                                                  int64_t first_row, int round) {
    // Each row has its own lanes, as far as they go round.
    constexpr int kLanes = 32 / Rows;
    const int64_t row = first_row + threadIdx.x % Rows;
    if (row >= args.nrows) return;
    const int64_t in_row = args.ncols / Chunk;
    const int64_t begin = int64_t{round} * (kPartials * kChunks);
    const int64_t end = min(begin + kPartials * kChunks, in_row);
    inputs.scales.prefetch((row * in_row + begin) >> inputs.shift,
                           ((row * in_row + end - 1) >> inputs.shift) + 1, threadIdx.x % 32 / Rows,
                           kLanes);
  }

 private:
  static constexpr int kChunks = kUnit / Chunk;
  static constexpr int kOwn = kChunks / 4;

  __device__ __forceinline__ void load(const Nf4Inputs& inputs, int64_t first_row, int round) {
    const int64_t row = first_row + threadIdx.x % 32 / 4;
    const int chunk = first_ + round * (kPartials * kChunks);
#pragma unroll
    for (int i = 0; i < Rows / 8; ++i) {
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        loaded_[i][j] = {0, 0.0f};
        if (row + 8 * i < nrows_ && chunk + 4 * j < in_row_) {
          const int64_t at = (row + 8 * i) * in_row_ + chunk + 4 * j;
          loaded_[i][j] = inputs.scales.load(at >> inputs.shift);
        }
      }
    }
  }

  int64_t nrows_;
  int in_row_;
  int first_;
  int64_t row_;
  typename Scales::Loaded loaded_[Rows / 8][kOwn];
  float scales_[Rows / 8][kOwn];
};

}  // namespace bcy
