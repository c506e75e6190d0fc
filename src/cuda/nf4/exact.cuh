// SPDX-License-Identifier: Apache-2.0
// y[m, n] = sum_k weight[n, k] * x[m, k] by float32 FMAs, in the order of order.cuh for codes: the
// bits of the CPU backend.
#pragma once

#include "cuda/common/activations.cuh"
#include "scales.cuh"

namespace bcy {

// Rows of whole words: a lane holds words t and t + 4 of each chunk. OneScale: of a chunk; else one
// a group. AtOnce: four elements of x from a multiple of four on can be loaded at once.
template <class X, int Tokens, bool OneScale, bool AtOnce>
class Nf4ExactTile : public TileDefaults {
 public:
  using Format = Nf4Rows;
  using Inputs = Nf4Inputs;
  using Ring = RowRing<Nf4Rows, kTileRows, AtOnce>;
  static constexpr int kTokens = Tokens;
  static constexpr int kRows = kTileRows;
  static constexpr int kBlocks = Tokens == 1 ? 2 : 1;
  static constexpr int kMemory = kTableBytes;
  static constexpr int kScaled = OneScale ? kChunk : kGroup;  // elements of a scale

  static __device__ __forceinline__ void prefetch(const ProductArgs& args, const Nf4Inputs& inputs,
                                                  int64_t first_row, int round) {
    LoadedScales<kRows, kScaled>::prefetch(args, inputs, first_row, round);
  }

  static __device__ __forceinline__ void prepare(const Nf4Inputs& inputs, uint8_t* memory) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    fill_table<kConsumers>(memory, inputs.codes, pair_of_words);
    consumers_sync<kConsumers>();
#endif
  }

  // Tokens past the end repeat the last one; their sums are not stored.
  __device__ __forceinline__ Nf4ExactTile(const ProductArgs& args, const Nf4Inputs& inputs,
                                          int64_t first_row, int64_t first_token, int first_unit,
                                          const uint8_t* memory)
      : inputs_(&inputs), table_(memory), scales_(args, inputs, first_row, first_unit, nullptr) {
#pragma unroll
    for (int token = 0; token < Tokens; ++token) {
      x_[token] = static_cast<const Storage*>(args.x) +
                  min(first_token + token, args.m - 1) * args.x_stride + first_unit * kUnit +
                  threadIdx.x % 4 * 8;
    }
  }

  __device__ __forceinline__ void clear(int64_t following) {
    following_ = following;
#pragma unroll
    for (int token = 0; token < Tokens; ++token) {
#pragma unroll
      for (int i = 0; i < kOctets; ++i) partial_[token][i] = 0.0f;
    }
  }

  template <class Row, class Read>
  __device__ __forceinline__ void add_unit(const RowsOf<Row, kRows>& rows, int round, int groups,
                                           int next, Read read) {
    const int here = threadIdx.x % 4;
    scales_.take(rows, *inputs_, round, next, following_);
    float sums[Tokens][kOctets][kUnitChunks] = {};
    float own[kOctets];  // scales of chunk t
#pragma unroll
    for (int chunk = 0; chunk < kUnitChunks; ++chunk) {
      if (2 * chunk >= groups) break;
      float factors[kOctets][2];
#pragma unroll
      for (int i = 0; i < kOctets; ++i) {
        if constexpr (OneScale) {
          own[i] = scales_.own(i, 0);
        } else {
          const float first = scales_(i, 2 * chunk), second = scales_(i, 2 * chunk + 1);
          const bool one = as_bits(first) == as_bits(second);
          factors[i][0] = one ? 1.0f : first;
          factors[i][1] = one ? 1.0f : second;
          if (chunk == here) own[i] = one ? first : 1.0f;
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int group = 2 * chunk + half;
        const int element = round * (kPartials * kUnit) + group * kGroup;
        float x[Tokens][8];
#pragma unroll
        for (int token = 0; token < Tokens; ++token) {
          load_four<X>(x_[token] + element, AtOnce, x[token]);
          load_four<X>(x_[token] + element + 4, AtOnce, x[token] + 4);
        }
#pragma unroll
        for (int i = 0; i < kOctets; ++i) {
          const uint32_t word = rows.row[i].load32(group * 16, here * 4);
          float values[8];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const uint2 codes = table_(word, j);
            values[2 * j] = as_float(codes.x);
            values[2 * j + 1] = as_float(codes.y);
          }
          if constexpr (!OneScale) {
#pragma unroll
            for (float& value : values) value = mul(value, factors[i][half]);
          }
#pragma unroll
          for (int token = 0; token < Tokens; ++token) {
            float& sum = sums[token][i][chunk];
            const float pairs = add_word(values, x[token]);
            sum = half == 0 ? pairs : add(sum, pairs);
          }
        }
      }
    }
    read();
#pragma unroll
    for (int token = 0; token < Tokens; ++token) {
#pragma unroll
      for (int i = 0; i < kOctets; ++i) {
        const float words = meet_words(sums[token][i]);
        const float chunk = 2 * here < groups ? mul(words, own[i]) : 0.0f;
        partial_[token][i] = add(partial_[token][i], meet_chunks(chunk));
      }
    }
  }

  __device__ __forceinline__ void store(
      float (&partials)[Tokens][Meeting<kRows, Tokens>::kPitch]) const {
    if (threadIdx.x % 4 != 0) return;
#pragma unroll
    for (int token = 0; token < Tokens; ++token) {
#pragma unroll
      for (int i = 0; i < kOctets; ++i) {
        partials[token][threadIdx.x % 32 / 4 + 8 * i] = partial_[token][i];
      }
    }
  }

 private:
  using Storage = typename X::Storage;
  static constexpr int kOctets = kRows / 8;

  // Of four chunks what this lane has, words t and t + 4 together, to the whole of chunk t.
  static __device__ __forceinline__ float meet_words(const float (&sums)[kUnitChunks]) {
    const bool upper = threadIdx.x & 2, odd = threadIdx.x & 1;
    float kept[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sent = upper ? sums[i] : sums[i + 2];
      kept[i] = add(upper ? sums[i + 2] : sums[i], __shfl_xor_sync(~0u, sent, 2));
    }
    const float sent = odd ? kept[0] : kept[1];
    return add(odd ? kept[1] : kept[0], __shfl_xor_sync(~0u, sent, 1));
  }
  static __device__ __forceinline__ float meet_chunks(float sum) {
    sum = add(sum, __shfl_xor_sync(~0u, sum, 2));
    return add(sum, __shfl_xor_sync(~0u, sum, 1));
  }

  const Nf4Inputs* inputs_;
  Table table_;
  LoadedScales<kRows, kScaled> scales_;
  int64_t following_ = 0;
  const Storage* x_[Tokens];  // this lane's first element in this warp's first unit
  float partial_[Tokens][kOctets];
};

// Any layout, block size, number of columns and address: warp p is partial sum p, its lane l word l
// of a unit. Rows are two that share bytes where the layout has pairs of rows.
constexpr int kAnyRows = 2, kAnyTokens = 4;

template <class X>
__global__ void __launch_bounds__(kConsumers)
    nf4_product_any(const __grid_constant__ bcy_nf4_matmul_args args,
                    const __grid_constant__ Nf4Inputs inputs, const __grid_constant__ Blocks blocks,
                    unsigned passes) {
  using Storage = typename X::Storage;
  __shared__ float codebook[16];
  __shared__ float partials[kAnyTokens][kAnyRows][kPartials];
  if (threadIdx.x < 16) codebook[threadIdx.x] = as_float(inputs.codes.words[threadIdx.x]);
  __syncthreads();
  const int64_t first_row = blockIdx.x / passes * int64_t{kAnyRows};
  const int64_t first_token = blockIdx.x % passes * int64_t{kAnyTokens};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int ncols = int(args.weight.ncols);
  const auto* const codes = static_cast<const uint8_t*>(args.weight.codes);
  const auto* const x = static_cast<const Storage*>(args.x);
  float sums[kAnyTokens][kAnyRows] = {};
#pragma unroll 1
  for (int unit = warp; unit * kUnit < ncols; unit += kPartials) {
    const int k = unit * kUnit + lane * 8;
    const int count = max(0, min(8, ncols - k));
    const bool exists = unit * kUnit + lane / 8 * kChunk < ncols;  // its chunk
    float values[kAnyRows][8], scales[kAnyRows];
#pragma unroll
    for (int i = 0; i < kAnyRows; ++i) {
      // Rows past the end repeat the last one; they are not stored.
      const int64_t row = min(first_row + i, args.weight.nrows - 1);
      float factors[8];
      if (count > 0) {
        const int64_t block = blocks(row, k);
        const bool same = blocks(row, k + count - 1) == block;
        const float factor = inputs.scales[block];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          factors[j] = same || j >= count ? factor : inputs.scales[blocks(row, k + j)];
        }
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        values[i][j] = 0.0f;
        if (j >= count) continue;
        const int64_t element = row * ncols + k + j;
        const int byte = blocks.across ? codes[element / 2] : codes[first_row / 2 * ncols + k + j];
        const bool high = blocks.across ? element % 2 == 0 : i == 1;
        values[i][j] = codebook[high ? byte >> 4 : byte & 15];
      }
      // Where a chunk's elements have one scale it multiplies their sum.
      const float first = __shfl_sync(~0u, factors[0], lane & 24);
      bool one = true;
#pragma unroll
      for (int j = 0; j < 8; ++j) one &= j >= count || as_bits(factors[j]) == as_bits(first);
#pragma unroll
      for (int width = 4; width > 0; width /= 2) one &= __shfl_xor_sync(~0u, int(one), width) != 0;
      scales[i] = one ? first : 1.0f;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (!one && j < count) values[i][j] = mul(values[i][j], factors[j]);
      }
    }
#pragma unroll
    for (int j = 0; j < kAnyTokens; ++j) {
      const int64_t token = min(first_token + j, args.m - 1);
      float elements[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        elements[e] = e < count ? X::load(x + token * args.x_stride + k + e) : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kAnyRows; ++i) {
        float sum = add_word(values[i], elements);
#pragma unroll
        for (int width = 4; width > 0; width /= 2) {
          sum = add(sum, __shfl_xor_sync(~0u, sum, width));
        }
        sum = exists ? mul(sum, scales[i]) : 0.0f;
        sum = add(sum, __shfl_xor_sync(~0u, sum, 16));
        sum = add(sum, __shfl_xor_sync(~0u, sum, 8));
        sums[j][i] = add(sums[j][i], sum);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kAnyTokens; ++j) {
#pragma unroll
    for (int i = 0; i < kAnyRows; ++i) {
      if (lane == 0) partials[j][i][warp] = sums[j][i];
    }
  }
  __syncthreads();
  if (threadIdx.x >= kAnyTokens * kAnyRows) return;
  const int64_t row = first_row + threadIdx.x % kAnyRows;
  const int64_t token = first_token + threadIdx.x / kAnyRows;
  if (row >= args.weight.nrows || token >= args.m) return;
  store_output(args, token, row, meet(partials[threadIdx.x / kAnyRows][threadIdx.x % kAnyRows]));
}

}  // namespace bcy
