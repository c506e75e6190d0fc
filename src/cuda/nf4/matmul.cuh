// SPDX-License-Identifier: Apache-2.0
// y[m, n] = sum_k weight[n, k] * x[m, k] on float16 or bfloat16 tensor cores.
//
// A code is the sum of two numbers of 16 bits: they take the places of two rows, r and r + 8, of one
// instruction, so that its two sums add up to what float32 FMAs would give. The order: a chunk, 64
// elements or what a block has if less, is summed by tensor cores, high and low parts meet, the
// block's scale multiplies; the chunks of a unit meet two by two, in order; then the units of a
// partial sum and the partial sums as in order.cuh.
#pragma once

#include "tile.cuh"

namespace bcy {

// c += a * b, 16 rows by 16 elements times 8 tokens: a holds rows r and r + 8 of elements 2 t and
// 2 t + 1, then of elements 8 on, b those elements of token r; c tokens 2 t and 2 t + 1 of row r,
// then of row r + 8.
template <class X>
__device__ __forceinline__ void mma_floats(float (&c)[4], uint2 a, uint2 a8, uint32_t b,
                                           uint32_t b8) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<X, F16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a8.x), "r"(a8.y), "r"(b), "r"(b8));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a8.x), "r"(a8.y), "r"(b), "r"(b8));
  }
#endif
}

// What both tiles share. Rows of the weight are octets, a row each of r = lane / 4.
template <class X, int RowTiles, int Chunk>
class Nf4Octets {
 public:
  using Format = Nf4Rows;
  using Inputs = Nf4Inputs;
  static constexpr int kRows = RowTiles * kTileRows;
  static constexpr int kOctets = kRows / 8;
  static constexpr int kChunks = kUnit / Chunk;
  static constexpr int kChunkGroups = Chunk / kGroup;

  static __device__ __forceinline__ void prefetch(const bcy_gguf_matmul_args& args,
                                                  const Nf4Inputs& inputs, int64_t first_row,
                                                  int round) {
    UnitScales<kRows, Chunk>::prefetch(args, inputs, first_row, round);
  }

  static __device__ __forceinline__ void prepare(const bcy_gguf_matmul_args&,
                                                 const Nf4Inputs& inputs, uint8_t* memory) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    fill_table(memory, inputs.codes, pair_of_halves);
    consumers_sync<kConsumers>();
    wait_for_previous_kernel();
#endif
  }

 protected:
  __device__ __forceinline__ Nf4Octets(const bcy_gguf_matmul_args& args, const Nf4Inputs& inputs,
                                       int64_t first_row, int first_unit, const uint8_t* memory)
      : inputs_(&inputs), table_(memory), scales_(args, inputs, first_row, first_unit) {}

  static __device__ __forceinline__ int r() { return threadIdx.x % 32 / 4; }
  static __device__ __forceinline__ int t() { return threadIdx.x % 4; }

  // A group of an octet times what lane (r, t) has of it: elements 8 t .. 8 t + 7 of column r.
  template <int Tiles, class Row>
  __device__ __forceinline__ void multiply(const Row& row, int group, const uint4 (&x)[Tiles],
                                           float (&sums)[Tiles][4]) const {
    const uint32_t word = row.load32(group * 16, t() * 4);
    const uint2 entries[4] = {table_(word, 0), table_(word, 1), table_(word, 2), table_(word, 3)};
#pragma unroll
    for (int n = 0; n < Tiles; ++n) {
      mma_floats<X>(sums[n], entries[0], entries[1], x[n].x, x[n].y);
      mma_floats<X>(sums[n], entries[2], entries[3], x[n].z, x[n].w);
    }
  }

  // Eight activations; AtOnce: they lie on a boundary of 16 bytes.
  template <bool AtOnce>
  static __device__ __forceinline__ uint4 load_eight(const uint16_t* x) {
    if constexpr (AtOnce) return *reinterpret_cast<const uint4*>(x);
    return {x[0] | uint32_t{x[1]} << 16, x[2] | uint32_t{x[3]} << 16, x[4] | uint32_t{x[5]} << 16,
            x[6] | uint32_t{x[7]} << 16};
  }

  const Nf4Inputs* inputs_;
  Table table_;
  UnitScales<kRows, Chunk> scales_;
  int64_t following_ = 0;
};

// One token. Column 2 c of the instructions is chunk c of the token, so that lane t ends up with
// the sum of chunk t, whose scale it has.
template <class X, int RowTiles, int Blocks, bool AtOnce>
class Nf4TokenTile : public Nf4Octets<X, RowTiles, 64> {
  using Base = Nf4Octets<X, RowTiles, 64>;
  using Base::r, Base::t, Base::kOctets, Base::inputs_, Base::scales_, Base::following_;

 public:
  using Base::kRows;
  static constexpr int kTokens = 1;
  static constexpr int kBlocks = Blocks;

  __device__ __forceinline__ Nf4TokenTile(const bcy_gguf_matmul_args& args,
                                          const Nf4Inputs& inputs, int64_t first_row,
                                          int64_t first_token, int first_unit,
                                          const uint8_t* memory)
      : Base(args, inputs, first_row, first_unit, memory) {
    const int first = first_unit * kUnit + r() / 2 * 64;
    x_ = static_cast<const uint16_t*>(args.x) + first_token * args.x_stride + first + t() * 8;
    left_ = int(args.ncols) - first;
    load(0);
  }

  __device__ __forceinline__ void clear(int64_t following) {
    following_ = following;
#pragma unroll
    for (int i = 0; i < kOctets; ++i) partial_[i] = 0.0f;
  }

  template <class Row>
  __device__ __forceinline__ void add_unit(const RowsOf<Row, kRows>& rows, int round, int,
                                           int next) {
    scales_.take(*inputs_, round, next, following_);
    const uint4 x[2][1] = {{next_[0]}, {next_[1]}};
    load(next);
    float own[kOctets];
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) {
#pragma unroll
      for (int i = 0; i < kOctets; ++i) {
        float sums[1][4] = {};
        this->multiply(rows.row[i], 2 * chunk, x[0], sums);
        this->multiply(rows.row[i], 2 * chunk + 1, x[1], sums);
        const float sum = add(sums[0][0], sums[0][2]);
        own[i] = chunk == 0 || t() == chunk ? sum : own[i];
      }
    }
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      float sum = mul(own[i], scales_.own(i, 0));
      sum = add(sum, __shfl_xor_sync(~0u, sum, 1));
      sum = add(sum, __shfl_xor_sync(~0u, sum, 2));
      partial_[i] = add(partial_[i], sum);
    }
  }

  __device__ __forceinline__ void store(float (&partials)[1][Meeting<kRows, 1>::kPitch]) const {
    if (t() != 0) return;
#pragma unroll
    for (int i = 0; i < kOctets; ++i) partials[0][i * 8 + r()] = partial_[i];
  }

 private:
  // Zeros past the end: they take what no weight belongs to out of the sums.
  __device__ __forceinline__ void load(int round) {
    const int element = round * (kPartials * kUnit);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      next_[i] = {0, 0, 0, 0};
      if (element < left_) next_[i] = Base::template load_eight<AtOnce>(x_ + element + i * kGroup);
    }
  }

  const uint16_t* x_;  // this lane's first element of its column in this warp's first unit
  int left_;           // elements from its column's first on
  uint4 next_[2];      // of the unit to come
  float partial_[kOctets];
};

// Tokens in eights. Chunk: 32 or 64, what lies in one block of the weight.
template <class X, int Tokens, int RowTiles, int Blocks, int Chunk, bool AtOnce>
class Nf4Tile : public Nf4Octets<X, RowTiles, Chunk> {
  using Base = Nf4Octets<X, RowTiles, Chunk>;
  using Base::r, Base::t, Base::kOctets, Base::inputs_, Base::scales_, Base::following_;
  using Base::kChunks, Base::kChunkGroups;

 public:
  using Base::kRows;
  static constexpr int kTokens = Tokens;
  static constexpr int kBlocks = Blocks;

  __device__ __forceinline__ Nf4Tile(const bcy_gguf_matmul_args& args, const Nf4Inputs& inputs,
                                     int64_t first_row, int64_t first_token, int first_unit,
                                     const uint8_t* memory)
      : Base(args, inputs, first_row, first_unit, memory) {
    const int first = first_unit * kUnit;
    x_ = static_cast<const uint16_t*>(args.x) + (first_token + r()) * args.x_stride + first +
         t() * 8;
    stride_ = args.x_stride;
    tokens_ = int(min(args.m - first_token - r(), int64_t{Tokens}));
    left_ = int(args.ncols) - first;
    load(0);
  }

  __device__ __forceinline__ void clear(int64_t following) {
    following_ = following;
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) partial_[i][n][0] = partial_[i][n][1] = 0.0f;
    }
  }

  template <class Row>
  __device__ __forceinline__ void add_unit(const RowsOf<Row, kRows>& rows, int round, int,
                                           int next) {
    scales_.take(*inputs_, round, next, following_);
    const int first = round * (kPartials * kUnit);
    float one[kOctets][kTiles][2], two[kOctets][kTiles][2], four[kOctets][kTiles][2];
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      float sums[kOctets][kTiles][4] = {};
#pragma unroll
      for (int j = 0; j < kChunkGroups; ++j) {
        const int group = chunk * kChunkGroups + j;
        uint4 x[kTiles];
#pragma unroll
        for (int n = 0; n < kTiles; ++n) x[n] = next_[n];
        load(group + 1 < kUnitGroups ? first + (group + 1) * kGroup : next * (kPartials * kUnit));
#pragma unroll
        for (int i = 0; i < kOctets; ++i) this->multiply(rows.row[i], group, x, sums[i]);
      }
#pragma unroll
      for (int i = 0; i < kOctets; ++i) {
        const float scale = scales_(i, chunk);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float sum = mul(add(sums[i][n][j], sums[i][n][j + 2]), scale);
            if (chunk % 2 == 0) {
              one[i][n][j] = sum;
              continue;
            }
            sum = add(one[i][n][j], sum);
            if (chunk % 4 == 1) {
              two[i][n][j] = sum;
              continue;
            }
            sum = add(two[i][n][j], sum);
            if (chunk == 3) four[i][n][j] = sum;
            if (chunk == 7) sum = add(four[i][n][j], sum);
            if (chunk + 1 == kChunks) partial_[i][n][j] = add(partial_[i][n][j], sum);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void store(
      float (&partials)[Tokens][Meeting<kRows, Tokens>::kPitch]) const {
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          partials[n * 8 + 2 * t() + j][i * 8 + r()] = partial_[i][n][j];
        }
      }
    }
  }

 private:
  static constexpr int kTiles = (Tokens + 7) / 8;

  // Zeros past the ends: they take what no weight belongs to out of the sums.
  __device__ __forceinline__ void load(int element) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      next_[n] = {0, 0, 0, 0};
      if (8 * n < tokens_ && element < left_) {
        next_[n] = Base::template load_eight<AtOnce>(x_ + n * 8 * stride_ + element);
      }
    }
  }

  const uint16_t* x_;  // token r, this lane's first element in this warp's first unit
  int64_t stride_;
  int tokens_;         // from token r on
  int left_;           // elements from the first on
  uint4 next_[kTiles];
  float partial_[kOctets][kTiles][2];
};

}  // namespace bcy
