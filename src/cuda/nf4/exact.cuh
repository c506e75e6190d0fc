// SPDX-License-Identifier: Apache-2.0
// y[m, n] = sum_k weight[n, k] * x[m, k] by float32 FMAs, in the order of order.cuh for floats: the
// bits of the CPU backend.
#pragma once

#include "cuda/common/activations.cuh"
#include "tile.cuh"

namespace bcy {

// Rows of whole words: a lane holds rows r, r + 8, ... and elements 8 t .. 8 t + 7 of each group,
// each a partial sum of its own. AtOnce: four elements of x from a multiple of four on can be
// loaded at once.
template <class X, int Tokens, bool AtOnce>
class Nf4ExactTile : public TileDefaults {
 public:
  using Format = Nf4Rows;
  using Inputs = Nf4Inputs;
  static constexpr int kTokens = Tokens;
  static constexpr int kRows = kTileRows;
  static constexpr int kBlocks = Tokens == 1 ? 2 : 1;

  static __device__ __forceinline__ void prefetch(const ProductArgs& args, const Nf4Inputs& inputs,
                                                  int64_t first_row, int round) {
    UnitScales<kRows, kGroup>::prefetch(args, inputs, first_row, round);
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
      : inputs_(&inputs), table_(memory), scales_(args, inputs, first_row, first_unit) {
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
      for (int i = 0; i < kOctets; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) sums_[token][i][j] = 0.0f;
      }
    }
  }

  template <class Row, class Read>
  __device__ __forceinline__ void add_unit(const RowsOf<Row, kRows>& rows, int round, int groups,
                                           int next, Read read) {
    scales_.take(*inputs_, round, next, following_);
#pragma unroll
    for (int group = 0; group < kUnitGroups; ++group) {
      if (group >= groups) break;
      const int element = round * (kPartials * kUnit) + group * kGroup;
      float x[Tokens][8];
#pragma unroll
      for (int token = 0; token < Tokens; ++token) {
        load_four<X>(x_[token] + element, AtOnce, x[token]);
        load_four<X>(x_[token] + element + 4, AtOnce, x[token] + 4);
      }
#pragma unroll
      for (int i = 0; i < kOctets; ++i) {
        const uint32_t word = rows.row[i].load32(group * 16, threadIdx.x % 4 * 4);
        const float scale = scales_(i, group);
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
          const uint2 codes = table_(word, j / 2);
          const float weights[2] = {mul(as_float(codes.x), scale), mul(as_float(codes.y), scale)};
#pragma unroll
          for (int token = 0; token < Tokens; ++token) {
            float* const sums = sums_[token][i] + j;
            sums[0] = fma(weights[0], x[token][j], sums[0]);
            sums[1] = fma(weights[1], x[token][j + 1], sums[1]);
          }
        }
      }
    }
    read();
  }

  // Elements 16 and 8 apart meet in neighbouring lanes, those 4, 2 and 1 apart in this one.
  __device__ __forceinline__ void store(
      float (&partials)[Tokens][Meeting<kRows, Tokens>::kPitch]) const {
#pragma unroll
    for (int token = 0; token < Tokens; ++token) {
#pragma unroll
      for (int i = 0; i < kOctets; ++i) {
        float s[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          s[j] = sums_[token][i][j];
          s[j] = add(s[j], __shfl_xor_sync(~0u, s[j], 2));
          s[j] = add(s[j], __shfl_xor_sync(~0u, s[j], 1));
        }
        if (threadIdx.x % 4 == 0) {
          partials[token][threadIdx.x % 32 / 4 + 8 * i] =
              add(add(add(s[0], s[4]), add(s[2], s[6])), add(add(s[1], s[5]), add(s[3], s[7])));
        }
      }
    }
  }

 private:
  using Storage = typename X::Storage;
  static constexpr int kOctets = kRows / 8;

  const Nf4Inputs* inputs_;
  Table table_;
  UnitScales<kRows, kGroup> scales_;
  int64_t following_ = 0;
  const Storage* x_[Tokens];  // this lane's first element in this warp's first unit
  float sums_[Tokens][kOctets][8];
};

// Any layout, block size, number of columns and address: lane e of warp p is partial sum (p, e).
// Rows are two that share bytes where the layout has pairs of rows.
constexpr int kAnyRows = 2, kAnyTokens = 4;

template <class X>
__global__ void __launch_bounds__(kConsumers)
    nf4_product_any(const __grid_constant__ bcy_nf4_matmul_args args,
                    const __grid_constant__ Nf4Inputs inputs, const __grid_constant__ Blocks blocks,
                    unsigned passes) {
  using Storage = typename X::Storage;
  __shared__ float values[16];
  __shared__ float partials[kAnyTokens][kAnyRows][kPartials];
  if (threadIdx.x < 16) values[threadIdx.x] = as_float(inputs.codes.words[threadIdx.x]);
  __syncthreads();
  const int64_t first_row = blockIdx.x / passes * int64_t{kAnyRows};
  const int64_t first_token = blockIdx.x % passes * int64_t{kAnyTokens};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int ncols = int(args.weight.ncols);
  const auto* const codes = static_cast<const uint8_t*>(args.weight.codes);
  const auto* const x = static_cast<const Storage*>(args.x);
  float sums[kAnyTokens][kAnyRows] = {};
  for (int unit = warp; unit * kUnit < ncols; unit += kPartials) {
#pragma unroll 1
    for (int k = unit * kUnit + lane; k < min((unit + 1) * kUnit, ncols); k += kGroup) {
      float weights[kAnyRows];
#pragma unroll
      for (int i = 0; i < kAnyRows; ++i) {
        // Rows past the end repeat the last one; they are not stored.
        const int64_t row = min(first_row + i, args.weight.nrows - 1);
        const int64_t element = row * ncols + k;
        const int byte = blocks.across ? codes[element / 2] : codes[first_row / 2 * ncols + k];
        const bool high = blocks.across ? element % 2 == 0 : i == 1;
        weights[i] = mul(values[high ? byte >> 4 : byte & 15], inputs.scales[blocks(row, k)]);
      }
#pragma unroll
      for (int j = 0; j < kAnyTokens; ++j) {
        const int64_t token = min(first_token + j, args.m - 1);
        const float value = X::load(x + token * args.x_stride + k);
#pragma unroll
        for (int i = 0; i < kAnyRows; ++i) sums[j][i] = fma(weights[i], value, sums[j][i]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kAnyTokens; ++j) {
#pragma unroll
    for (int i = 0; i < kAnyRows; ++i) {
#pragma unroll
      for (int width = kGroup / 2; width > 0; width /= 2) {
        sums[j][i] = add(sums[j][i], __shfl_xor_sync(~0u, sums[j][i], width));
      }
      if (lane == 0) partials[j][i][warp] = sums[j][i];
    }
  }
  __syncthreads();
  if (threadIdx.x >= kAnyTokens * kAnyRows) return;
  const int64_t row = first_row + threadIdx.x % kAnyRows;
  const int64_t token = first_token + threadIdx.x / kAnyRows;
  if (row >= args.weight.nrows || token >= args.m) return;
  const float* const p = partials[threadIdx.x / kAnyRows][threadIdx.x % kAnyRows];
  float y = meet(p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]);
  if (args.bias != nullptr) y = add(y, load_element(args.bias, row, args.y_type));
  store_element(args.y, token * args.y_stride + row, args.y_type, y);
}

}  // namespace bcy
