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
  float code_scale = 1.0f;  // what the codes stand for, over what they are in `codes`
};

// Bytes of a row's scales in a unit. Absmax: float, or uint8_t where they are nested.
template <class Absmax>
constexpr int kRowScales = kUnitChunks * int(sizeof(Absmax));

// Whether there is one for each chunk, in multiples of 16 bytes that begin at such, as copies to
// shared memory take them.
template <class Absmax>
bool can_copy_scales(const ProductArgs& args, const Nf4Inputs& inputs) {
  const bool nested = inputs.scales.nested_absmax != nullptr;
  return nested == std::is_same_v<Absmax, uint8_t> && inputs.shift == 0 &&
         args.ncols / kChunk * sizeof(Absmax) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(inputs.scales.absmax) % 16 == 0;
}

// Bytes of a row in a box of scales: the least that the copy engine copies, a unit's floats or the
// codes of nested ones of four units.
constexpr int kScaleBox = 16;
static_assert(kRowScales<float> == kScaleBox);

// Describes scales that can be copied to the copy engine, in boxes of so many rows.
template <class Absmax>
int describe_scales(const ProductArgs& args, const Nf4Inputs& inputs, int rows,
                    CUtensorMap& scales) {
  const int64_t bytes_of_row = args.ncols / kChunk * int64_t(sizeof(Absmax));
  return describe_plain_boxes(inputs.scales.absmax, bytes_of_row, args.nrows, kScaleBox, rows, true,
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

// Where the scale of this lane's chunk lies, from a row's first code in the unit of this warp.
template <class Absmax>
__device__ __forceinline__ int scale_in_ring(int warp) {
  const int of_unit = kRoundBytes<Nf4Rows> - warp * (kUnitBytes<Nf4Rows> - kRowScales<Absmax>);
  return of_unit + threadIdx.x % 4 * int(sizeof(Absmax));
}

template <class T>
struct Type {
  using type = T;
};
// Calls function(Type<Absmax>{}); of scales that cannot be copied Absmax is void.
template <class Function>
int with_absmax(const ProductArgs& args, const Nf4Inputs& inputs, Function&& function) {
  if (can_copy_scales<float>(args, inputs)) return function(Type<float>{});
  if (can_copy_scales<uint8_t>(args, inputs)) return function(Type<uint8_t>{});
  return function(Type<void>{});
}

// What a lane loads for its scales while the unit before is multiplied. load(chunk): of one,
// counted through the whole matrix.
template <int Rows, int Chunk, class Value>
class LoadedAhead {
 public:
  template <class Load>
  __device__ __forceinline__ LoadedAhead(const ProductArgs& args, int64_t first_row, int first_unit,
                                         Load load)
      : nrows_(args.nrows),
        in_row_(int(args.ncols / Chunk)),
        first_(first_unit * kChunks + threadIdx.x % 4),
        row_(first_row) {
    load_round(0, load);
  }

  // Of row r + 8 i, chunk t + 4 j.
  __device__ __forceinline__ Value operator()(int i, int j) const { return values_[i][j]; }

  // To the round that is `next` after the first, of these rows or of those from `following` on.
  template <class Load>
  __device__ __forceinline__ void advance(int round, int next, int64_t following, Load load) {
    if (next <= round) row_ = following;
    load_round(next, load);
  }

 private:
  static constexpr int kChunks = kUnit / Chunk, kOwn = kChunks / 4;

  template <class Load>
  __device__ __forceinline__ void load_round(int round, Load load) {
    const int64_t row = row_ + threadIdx.x % 32 / 4;
    const int chunk = first_ + round * (kPartials * kChunks);
#pragma unroll
    for (int i = 0; i < Rows / 8; ++i) {
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        values_[i][j] = {};
        if (row + 8 * i < nrows_ && chunk + 4 * j < in_row_) {
          values_[i][j] = load((row + 8 * i) * in_row_ + chunk + 4 * j);
        }
      }
    }
  }

  int64_t nrows_;
  int in_row_;
  int first_;
  int64_t row_;
  Value values_[Rows / 8][kOwn];
};

// Those that a ScaledRowRing brings.
template <int Rows, class Absmax>
class CopiedScales;

template <int Rows>
class CopiedScales<Rows, float> : public LaneScales<Rows, kChunk> {
 public:
  static constexpr int kMemory = 0;

  static __device__ __forceinline__ void prepare(const Nf4Inputs&, uint8_t*) {}
  static __device__ __forceinline__ void prefetch(const ProductArgs&, const Nf4Inputs&, int64_t,
                                                  int) {}

  __device__ __forceinline__ CopiedScales(const ProductArgs&, const Nf4Inputs&, int64_t,
                                          int first_unit, const uint8_t*)
      : at_(scale_in_ring<float>(first_unit)) {}

  template <class Row>
  __device__ __forceinline__ void take(const RowsOf<Row, Rows>& rows, const Nf4Inputs& inputs, int,
                                       int, int64_t) {
#pragma unroll
    for (int i = 0; i < Rows / 8; ++i) {
      const auto scale = rows.row[i].template moved<sizeof(float)>(at_);
      this->scales_[i][0] = mul(scale.template load<float>(0), inputs.code_scale);
    }
  }

 private:
  int at_;
};

// memory: where the values of nested ones lie for all lanes.
template <int Rows>
class CopiedScales<Rows, uint8_t> : public LaneScales<Rows, kChunk> {
 public:
  static constexpr int kMemory = 256 * int(sizeof(float));

  static __device__ __forceinline__ void prepare(const Nf4Inputs& inputs, uint8_t* memory) {
    static_assert(kConsumers == 256);
    reinterpret_cast<float*>(memory)[threadIdx.x] = inputs.scales.nested_code[threadIdx.x];
  }
  static __device__ __forceinline__ void prefetch(const ProductArgs&, const Nf4Inputs&, int64_t,
                                                  int) {}

  __device__ __forceinline__ CopiedScales(const ProductArgs& args, const Nf4Inputs& inputs,
                                          int64_t first_row, int first_unit, const uint8_t* memory)
      : at_(scale_in_ring<uint8_t>(first_unit)),
        code_(reinterpret_cast<const float*>(memory)),
        nested_(args, first_row, first_unit, load(inputs)) {}

  template <class Row>
  __device__ __forceinline__ void take(const RowsOf<Row, Rows>& rows, const Nf4Inputs& inputs,
                                       int round, int next, int64_t following) {
#pragma unroll
    for (int i = 0; i < Rows / 8; ++i) {
      const float value = code_[rows.row[i].template moved<1>(at_).load8(0)];
      this->scales_[i][0] = mul(inputs.scales.decode(value, nested_(i, 0)), inputs.code_scale);
    }
    nested_.advance(round, next, following, load(inputs));
  }

 private:
  static __device__ __forceinline__ auto load(const Nf4Inputs& inputs) {
    return [&](int64_t chunk) { return inputs.scales.nested_of(chunk); };
  }

  int at_;
  const float* code_;
  LoadedAhead<Rows, kChunk, float> nested_;
};

// Any.
template <int Rows, int Chunk>
class LoadedScales : public LaneScales<Rows, Chunk> {
  using Base = LaneScales<Rows, Chunk>;

 public:
  static constexpr int kMemory = 0;

  static __device__ __forceinline__ void prepare(const Nf4Inputs&, uint8_t*) {}

  __device__ __forceinline__ LoadedScales(const ProductArgs& args, const Nf4Inputs& inputs,
                                          int64_t first_row, int first_unit, const uint8_t*)
      : loaded_(args, first_row, first_unit, load(inputs)) {}

  // The scales of the unit that was loaded; starts to load the next.
  template <class Row>
  __device__ __forceinline__ void take(const RowsOf<Row, Rows>&, const Nf4Inputs& inputs, int round,
                                       int next, int64_t following) {
#pragma unroll
    for (int i = 0; i < Rows / 8; ++i) {
#pragma unroll
      for (int j = 0; j < Base::kOwn; ++j) {
        this->scales_[i][j] = mul(inputs.scales.decode(loaded_(i, j)), inputs.code_scale);
      }
    }
    loaded_.advance(round, next, following, load(inputs));
  }

  // Asks for the scales of a round of the eight warps.
  static __device__ __forceinline__ void prefetch(const ProductArgs& args, const Nf4Inputs& inputs,
                                                  int64_t first_row, int round) {
    // Each row has its own lanes, as far as they go round.
    constexpr int kLanes = 32 / Rows, kChunks = Base::kChunks;
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
  static __device__ __forceinline__ auto load(const Nf4Inputs& inputs) {
    return [&](int64_t chunk) { return inputs.scales.load(chunk >> inputs.shift); };
  }

  LoadedAhead<Rows, Chunk, typename Scales::Loaded> loaded_;
};

}  // namespace bcy
