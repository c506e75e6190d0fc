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

// Bytes of a row's scales in a unit. Absmax: float, or uint8_t where they are nested.
template <class Absmax>
constexpr int kRowScales = kUnitChunks * int(sizeof(Absmax));

// Whether there is one for each chunk, at places that the copy engine takes.
template <class Absmax>
bool can_copy_scales(const ProductArgs& args, const Nf4Inputs& inputs) {
  const bool nested = inputs.scales.nested_absmax != nullptr;
  return nested == std::is_same_v<Absmax, uint8_t> && inputs.shift == 0 &&
         args.ncols / kChunk * sizeof(Absmax) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(inputs.scales.absmax) % 16 == 0;
}

// Describes scales that can be copied to the copy engine, in boxes of `bytes` by `rows`.
template <class Absmax>
int describe_scales(const ProductArgs& args, const Nf4Inputs& inputs, int bytes, int rows,
                    CUtensorMap& scales) {
  const int64_t bytes_of_row = args.ncols / kChunk * int64_t(sizeof(Absmax));
  return describe_plain_boxes(inputs.scales.absmax, bytes_of_row, args.nrows, bytes, rows, true,
                              scales);
}

// The ring of rows with their scales behind a round of each.
template <int Rows, class Absmax>
struct ScaledRowRing : RowRing<Nf4Rows, Rows, true, kPartials * kRowScales<Absmax>> {
  using Base = RowRing<Nf4Rows, Rows, true, kPartials * kRowScales<Absmax>>;
  struct Source {
    const Absmax* absmax;
  };

  static int describe(const ProductArgs&, const Nf4Inputs& inputs, Source& source) {
    source.absmax = static_cast<const Absmax*>(inputs.scales.absmax);
    return BCY_OK;
  }

  static __device__ __forceinline__ void fetch(const ProductArgs& args, const Source& source,
                                               int64_t first_row, int round, uint8_t* to,
                                               uint64_t* filled) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    const int lane = threadIdx.x % 32;
    const int64_t row = first_row + lane;
    const bool exists = lane < Rows && row < args.nrows;
    const uint32_t codes = exists ? round_length<Nf4Rows>(args.ncols, round) : 0;
    const uint32_t scales = codes / (kUnitBytes<Nf4Rows> / kRowScales<Absmax>);
    expect_copies(filled, codes + scales);
    if (exists) {
      const auto* const weight = static_cast<const uint8_t*>(args.weight);
      const int64_t bytes_of_row = row_bytes<Nf4Rows>(args.ncols);
      const int64_t begin = int64_t{round} * kRoundBytes<Nf4Rows>;
      copy_row(to + lane * Base::kPitch, weight + row * bytes_of_row + begin, codes, filled);
      copy_row(to + lane * Base::kPitch + kRoundBytes<Nf4Rows>,
               source.absmax + row * (args.ncols / kChunk) + round * (kPartials * kUnitChunks),
               scales, filled);
    }
    copies_issued(filled);
#endif
  }
};

// The scales of a unit in chunks of Chunk elements: lane t has those of chunks t, t + 4, ... of its
// rows.
template <int Rows, int Chunk>
class LaneScales {
 public:
  // Of row r + 8 i in a chunk.
  __device__ __forceinline__ float operator()(int i, int chunk) const {
    return __shfl_sync(~0u, own(i, chunk), (threadIdx.x & 28) + chunk % 4);
  }
  // The same in lanes t = chunk % 4 alone. Where a lane has one scale a row it needs no index,
  // which a loop that is not unrolled could not give to registers.
  __device__ __forceinline__ float own(int i, int chunk) const {
    return scales_[i][kOwn == 1 ? 0 : chunk / 4];
  }

 protected:
  static constexpr int kChunks = kUnit / Chunk;
  static constexpr int kOwn = kChunks / 4;
  float scales_[Rows / 8][kOwn];
};

// Those that a ScaledRowRing brings. memory: where the code of nested ones lies for all lanes.
template <int Rows, class Absmax>
class CopiedScales : public LaneScales<Rows, kChunk> {
  static constexpr bool kNested = std::is_same_v<Absmax, uint8_t>;

 public:
  static constexpr int kMemory = kNested ? 256 * int(sizeof(float)) : 0;

  static __device__ __forceinline__ void prepare(const Nf4Inputs& inputs, uint8_t* memory) {
    if (!kNested || threadIdx.x >= 256) return;
    reinterpret_cast<float*>(memory)[threadIdx.x] = inputs.scales.nested_code[threadIdx.x];
  }

  __device__ __forceinline__ CopiedScales(const ProductArgs& args, const Nf4Inputs& inputs,
                                          int64_t first_row, int first_unit, const uint8_t* memory)
      : at_(kRoundBytes<Nf4Rows> - first_unit *
                                       (kUnitBytes<Nf4Rows> - kRowScales<Absmax>)+threadIdx.x % 4 *
                                       int(sizeof(Absmax))),
        nested_(args, inputs, first_row, first_unit, memory) {}

  template <class Row>
  __device__ __forceinline__ void take(const RowsOf<Row, Rows>& rows, const Nf4Inputs& inputs,
                                       int round, int next, int64_t following) {
#pragma unroll
    for (int i = 0; i < Rows / 8; ++i) {
      const auto place = rows.row[i].template moved<sizeof(Absmax)>(at_);
      const float absmax = nested_.decode(inputs, i, place.template load<Absmax>(0));
      this->scales_[i][0] = mul(absmax, inputs.unit);
    }
    nested_.advance(inputs, round, next, following);
  }

  static __device__ __forceinline__ void prefetch(const ProductArgs&, const Nf4Inputs&, int64_t,
                                                  int) {}

 private:
  struct NotNested {
    __device__ __forceinline__ NotNested(const ProductArgs&, const Nf4Inputs&, int64_t, int,
                                         const uint8_t*) {}
    __device__ __forceinline__ float decode(const Nf4Inputs&, int, float absmax) const {
      return absmax;
    }
    __device__ __forceinline__ void advance(const Nf4Inputs&, int, int, int64_t) {}
  };

  // What multiplies the code's values, loaded a unit ahead.
  struct Nested {
    const float* code;
    int64_t nrows, row;
    int in_row, first;
    float absmax[Rows / 8];

    __device__ __forceinline__ Nested(const ProductArgs& args, const Nf4Inputs& inputs,
                                      int64_t first_row, int first_unit, const uint8_t* memory)
        : code(reinterpret_cast<const float*>(memory)),
          nrows(args.nrows),
          row(first_row),
          in_row(int(args.ncols / kChunk)),
          first(first_unit * kUnitChunks + threadIdx.x % 4) {
      load(inputs, 0);
    }
    __device__ __forceinline__ float decode(const Nf4Inputs& inputs, int i, uint8_t value) const {
      return inputs.scales.decode(code[value], absmax[i]);
    }
    __device__ __forceinline__ void advance(const Nf4Inputs& inputs, int round, int next,
                                            int64_t following) {
      if (next <= round) row = following;
      load(inputs, next);
    }
    __device__ __forceinline__ void load(const Nf4Inputs& inputs, int round) {
      const int chunk = first + round * (kPartials * kUnitChunks);
#pragma unroll
      for (int i = 0; i < Rows / 8; ++i) {
        const int64_t here = row + threadIdx.x % 32 / 4 + 8 * i;
        absmax[i] = 0.0f;
        if (here < nrows && chunk < in_row) {
          absmax[i] = inputs.scales.nested_of(here * in_row + chunk);
        }
      }
    }
  };

  int at_;  // of this lane's, from a row's first code in the unit
  std::conditional_t<kNested, Nested, NotNested> nested_;
};

// Any. The loads of a unit are under way while the one before it is multiplied.
template <int Rows, int Chunk>
class LoadedScales : public LaneScales<Rows, Chunk> {
  using Base = LaneScales<Rows, Chunk>;
  using Base::kChunks, Base::kOwn;

 public:
  static constexpr int kMemory = 0;

  static __device__ __forceinline__ void prepare(const Nf4Inputs&, uint8_t*) {}

  __device__ __forceinline__ LoadedScales(const ProductArgs& args, const Nf4Inputs& inputs,
                                          int64_t first_row, int first_unit, const uint8_t*)
      : nrows_(args.nrows),
        in_row_(int(args.ncols / Chunk)),
        first_(first_unit * kChunks + threadIdx.x % 4),
        row_(first_row) {
    load(inputs, row_, 0);
  }

  // The scales of the unit that was loaded; starts to load the one that is `next` rounds after the
  // first, of these rows or of those from `following` on.
  template <class Row>
  __device__ __forceinline__ void take(const RowsOf<Row, Rows>&, const Nf4Inputs& inputs, int round,
                                       int next, int64_t following) {
#pragma unroll
    for (int i = 0; i < Rows / 8; ++i) {
#pragma unroll
      for (int j = 0; j < kOwn; ++j)
        this->scales_[i][j] = mul(inputs.scales.decode(loaded_[i][j]), inputs.unit);
    }
    if (next <= round) row_ = following;
    load(inputs, row_, next);
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
};

}  // namespace bcy
