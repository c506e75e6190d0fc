// SPDX-License-Identifier: Apache-2.0
// y[m, n] = sum_k weight[n, k] * x[m, k] on float16 or bfloat16 tensor cores.
//
// A code is the sum of two numbers of 16 bits: they take the places of two rows, r and r + 8, of
// one instruction, so that its two sums add up to what float32 FMAs would give. The order: a chunk,
// 64 elements or what a block has if less, is summed by tensor cores, high and low parts meet, the
// block's scale multiplies; the chunks of a unit meet two by two, and each two are added to the
// partial sum, in order; the partial sums meet as in order.cuh.
#pragma once

#include "cuda/common/mma.cuh"
#include "scales.cuh"

namespace bcy {

// A group of an octet of rows, one for each r, times what lane (r, t) has of it: elements 8 t ..
// 8 t + 7 of column r of each eight.
template <class X, int Tiles, class Row>
__device__ __forceinline__ void multiply_group(const Table& table, const Row& row, int group,
                                               const uint4 (&x)[Tiles], float (&sums)[Tiles][4]) {
  const uint32_t word = row.load32(group * 16, threadIdx.x % 4 * 4);
  const uint2 entries[4] = {table(word, 0), table(word, 1), table(word, 2), table(word, 3)};
#pragma unroll
  for (int n = 0; n < Tiles; ++n) {
    mma_floats<X>(sums[n], entries[0], entries[1], x[n].x, x[n].y);
    mma_floats<X>(sums[n], entries[2], entries[3], x[n].z, x[n].w);
  }
}

// The partial sums of Octets * 8 rows with Tiles * 8 tokens.
template <class X, int Octets, int Tiles, int Chunk>
struct Nf4Sums {
  float partial[Octets][Tiles][2];
  float first[Octets][Tiles][2];  // of two chunks

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < Octets; ++i) {
#pragma unroll
      for (int n = 0; n < Tiles; ++n) partial[i][n][0] = partial[i][n][1] = 0.0f;
    }
  }

  // sums: of one octet's chunk, high parts and low parts.
  __device__ __forceinline__ void add_chunk(int i, int chunk, const float (&sums)[Tiles][4],
                                            float scale) {
#pragma unroll
    for (int n = 0; n < Tiles; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float sum = mul(add(sums[n][j], sums[n][j + 2]), scale);
        if (chunk % 2 == 0) {
          first[i][n][j] = sum;
        } else {
          partial[i][n][j] = add(partial[i][n][j], add(first[i][n][j], sum));
        }
      }
    }
  }

  // load(group, x): what this lane has of each tile's activations.
  template <class Rows, class Scales, class Load>
  __device__ __forceinline__ void add_unit(const Table& table, const Rows& rows,
                                           const Scales& scales, Load load) {
    constexpr int kChunks = kUnit / Chunk, kChunkGroups = Chunk / kGroup;
    // Many sums leave no registers to load ahead of two chunks.
    [[maybe_unused]] constexpr int kUnroll = Tiles > 1 ? 2 : kChunks;
#pragma unroll kUnroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      float sums[Octets][Tiles][4] = {};
#pragma unroll
      for (int j = 0; j < kChunkGroups; ++j) {
        const int group = chunk * kChunkGroups + j;
        uint4 x[Tiles];
        load(group, x);
#pragma unroll
        for (int i = 0; i < Octets; ++i) {
          multiply_group<X>(table, rows.row[i], group, x, sums[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < Octets; ++i) add_chunk(i, chunk, sums[i], scales(i, chunk));
    }
  }

  // put(token, row, sum): of the sums that this lane has.
  template <class Put>
  __device__ __forceinline__ void store(Put put) const {
#pragma unroll
    for (int i = 0; i < Octets; ++i) {
#pragma unroll
      for (int n = 0; n < Tiles; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          put(n * 8 + threadIdx.x % 4 * 2 + j, i * 8 + threadIdx.x % 32 / 4, partial[i][n][j]);
        }
      }
    }
  }
};

// A single token: column 2 c of the instructions is chunk c of the token, so that lane t ends up
// with the sum of chunk t, whose scale it has.
template <class X, int Octets>
struct Nf4TokenSums {
  float partial[Octets];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < Octets; ++i) partial[i] = 0.0f;
  }

  template <class Rows, class Scales>
  __device__ __forceinline__ void add_unit(const Table& table, const Rows& rows,
                                           const Scales& scales, const uint4 (&x)[2]) {
    float own[Octets];
    const uint4 columns[2][1] = {{x[0]}, {x[1]}};
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) {
#pragma unroll
      for (int i = 0; i < Octets; ++i) {
        float sums[1][4] = {};
        multiply_group<X>(table, rows.row[i], 2 * chunk, columns[0], sums);
        multiply_group<X>(table, rows.row[i], 2 * chunk + 1, columns[1], sums);
        const float sum = add(sums[0][0], sums[0][2]);
        own[i] = chunk == 0 || threadIdx.x % 4 == chunk ? sum : own[i];
      }
    }
#pragma unroll
    for (int i = 0; i < Octets; ++i) {
      float sum = mul(own[i], scales.own(i, 0));
      sum = add(sum, __shfl_xor_sync(~0u, sum, 1));
      // Of lane t = 0, which stores, in order.
      partial[i] = add(add(partial[i], sum), __shfl_xor_sync(~0u, sum, 2));
    }
  }

  // put(token, row, sum): of the sums that this lane has.
  template <class Put>
  __device__ __forceinline__ void store(Put put) const {
    if (threadIdx.x % 4 != 0) return;
#pragma unroll
    for (int i = 0; i < Octets; ++i) put(0, i * 8 + threadIdx.x % 32 / 4, partial[i]);
  }
};

// Rows on boundaries of 16 bytes, and activations of which eight from a multiple of eight on are.
// Absmax: of scales that can be copied; void: they are loaded.
template <int Rows, class Absmax>
struct Nf4Regular {
  static constexpr int kRows = Rows;
  static constexpr int kChunk = bcy::kChunk;
  static constexpr bool kCopied = !std::is_void_v<Absmax>;
  using UnitScales =
      std::conditional_t<kCopied, CopiedScales<Rows, Absmax>, LoadedScales<Rows, kChunk>>;
  using Ring =
      std::conditional_t<kCopied, ScaledRowRing<Rows, Absmax>, RowRing<Nf4Rows, Rows, true>>;
  static constexpr bool kAtOnce = true;
};
// Any addresses. Chunk: 32 or 64, what lies in one block of the weight.
template <int Chunk>
struct Nf4Any {
  static constexpr int kRows = 16;
  static constexpr int kChunk = Chunk;
  using UnitScales = LoadedScales<kRows, Chunk>;
  using Ring = RowRing<Nf4Rows, kRows, false>;
  static constexpr bool kAtOnce = false;
};

// What the tiles share that product.cuh takes.
template <int Tokens, class From>
struct Nf4TileBase : TileDefaults {
  using Format = Nf4Rows;
  using Inputs = Nf4Inputs;
  using UnitScales = typename From::UnitScales;
  using Ring = typename From::Ring;
  static constexpr int kTokens = Tokens;
  static constexpr int kRows = From::kRows;
  static constexpr int kBlocks = Tokens <= 8 ? 2 : 1;
  static constexpr int kMemory = kTableBytes + UnitScales::kMemory;
  static constexpr bool kStartsNextAtOnce = Tokens == 8;
  using Partials = float[Tokens][Meeting<kRows, Tokens>::kPitch];

  static __device__ __forceinline__ void prefetch(const ProductArgs& args, const Nf4Inputs& inputs,
                                                  int64_t first_row, int round) {
    UnitScales::prefetch(args, inputs, first_row, round);
  }

  static __device__ __forceinline__ void prepare(const Nf4Inputs& inputs, uint8_t* memory) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    fill_table<kConsumers>(memory, inputs.codes, pair_of_halves);
    UnitScales::prepare(inputs, memory + kTableBytes);
    consumers_sync<kConsumers>();
#endif
  }
};

// One token, whose activations lie on a boundary of 16 bytes.
template <class X, class From>
class Nf4TokenTile : public Nf4TileBase<1, From> {
  using Base = Nf4TileBase<1, From>;

 public:
  using Base::kRows;

  __device__ __forceinline__ Nf4TokenTile(const ProductArgs& args, const Nf4Inputs& inputs,
                                          int64_t first_row, int64_t, int first_unit,
                                          const uint8_t* memory)
      : inputs_(&inputs),
        table_(memory),
        scales_(args, inputs, first_row, first_unit, memory + kTableBytes) {
    // Of the chunk that is this lane's column.
    const int first = first_unit * kUnit + threadIdx.x % 32 / 8 * 64;
    x_ = static_cast<const uint16_t*>(args.x) + first + threadIdx.x % 4 * 8;
    left_ = int(args.ncols) - first;
    load(0);
  }

  __device__ __forceinline__ void clear(int64_t following) {
    following_ = following;
    sums_.clear();
  }

  template <class Row, class Read>
  __device__ __forceinline__ void add_unit(const RowsOf<Row, kRows>& rows, int round, int, int next,
                                           Read read) {
    scales_.take(rows, *inputs_, round, next, following_);
    const uint4 x[2] = {next_[0], next_[1]};
    load(next * (kPartials * kUnit));
    sums_.add_unit(table_, rows, scales_, x);
    read();
  }

  __device__ __forceinline__ void store(typename Base::Partials& partials) const {
    sums_.store([&](int token, int row, float sum) { partials[token][row] = sum; });
  }

 private:
  // Zeros past the end: they take what no weight belongs to out of the sums.
  __device__ __forceinline__ void load(int element) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      next_[i] = {0, 0, 0, 0};
      if (element < left_) next_[i] = *reinterpret_cast<const uint4*>(x_ + element + i * kGroup);
    }
  }

  const Nf4Inputs* inputs_;
  Table table_;
  typename Base::UnitScales scales_;
  int64_t following_ = 0;
  const uint16_t* x_;  // this lane's first element in this warp's first unit
  int left_;  // elements from its chunk's first on
  uint4 next_[2];  // of the unit to come
  Nf4TokenSums<X, kRows / 8> sums_;
};

// Tokens in eights.
template <class X, int Tokens, class From>
class Nf4Tile : public Nf4TileBase<Tokens, From> {
  using Base = Nf4TileBase<Tokens, From>;

 public:
  using Base::kRows;

  __device__ __forceinline__ Nf4Tile(const ProductArgs& args, const Nf4Inputs& inputs,
                                     int64_t first_row, int64_t first_token, int first_unit,
                                     const uint8_t* memory)
      : inputs_(&inputs),
        table_(memory),
        scales_(args, inputs, first_row, first_unit, memory + kTableBytes) {
    const int64_t token = first_token + threadIdx.x % 32 / 4;
    const int first = first_unit * kUnit;
    x_ = static_cast<const uint16_t*>(args.x) + token * args.x_stride + first + threadIdx.x % 4 * 8;
    stride_ = args.x_stride;
    tokens_ = int(min(args.m - token, int64_t{Tokens}));
    left_ = int(args.ncols) - first;
    load(0);
  }

  __device__ __forceinline__ void clear(int64_t following) {
    following_ = following;
    sums_.clear();
  }

  template <class Row, class Read>
  __device__ __forceinline__ void add_unit(const RowsOf<Row, kRows>& rows, int round, int, int next,
                                           Read read) {
    scales_.take(rows, *inputs_, round, next, following_);
    const int first = round * (kPartials * kUnit);
    sums_.add_unit(table_, rows, scales_, [&](int group, uint4(&x)[kTiles]) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) x[n] = next_[n];
      load(group + 1 < kUnitGroups ? first + (group + 1) * kGroup : next * (kPartials * kUnit));
    });
    read();
  }

  __device__ __forceinline__ void store(typename Base::Partials& partials) const {
    sums_.store([&](int token, int row, float sum) { partials[token][row] = sum; });
  }

 private:
  static constexpr int kTiles = Tokens / 8;

  // Zeros past the ends: they take what no weight belongs to out of the sums.
  __device__ __forceinline__ void load(int element) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      next_[n] = {0, 0, 0, 0};
      if (8 * n >= tokens_ || element >= left_) continue;
      const uint16_t* const x = x_ + n * 8 * stride_ + element;
      if constexpr (From::kAtOnce) {
        next_[n] = *reinterpret_cast<const uint4*>(x);
      } else {
        next_[n] = {x[0] | uint32_t{x[1]} << 16, x[2] | uint32_t{x[3]} << 16,
                    x[4] | uint32_t{x[5]} << 16, x[6] | uint32_t{x[7]} << 16};
      }
    }
  }

  const Nf4Inputs* inputs_;
  Table table_;
  typename Base::UnitScales scales_;
  int64_t following_ = 0;
  const uint16_t* x_;  // token r, this lane's first element in this warp's first unit
  int64_t stride_;
  int tokens_;  // from token r on
  int left_;  // elements from the first on
  uint4 next_[kTiles];  // of the group to come
  Nf4Sums<X, kRows / 8, kTiles, From::kChunk> sums_;
};

template <class X, int Tokens, int Rows, class Absmax>
using Nf4RegularTile = std::conditional_t<Tokens == 1, Nf4TokenTile<X, Nf4Regular<Rows, Absmax>>,
                                          Nf4Tile<X, Tokens, Nf4Regular<Rows, Absmax>>>;
template <class X, int Chunk>
using Nf4AnyTile = Nf4Tile<X, 8, Nf4Any<Chunk>>;

}  // namespace bcy
