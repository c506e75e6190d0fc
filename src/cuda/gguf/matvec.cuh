// SPDX-License-Identifier: Apache-2.0
// y[m, n] = sum_k weight[n, k] * x[m, k] on float activations.
#pragma once

#include "operations.h"
#include "product.cuh"

namespace bcy {

struct FloatInputs {
  bool vectors;  // four elements of x from a multiple of four on can be loaded at once
};

// A lane holds rows r and r + 8 and eight element positions of a group: 4 t .. 4 t + 3 and those
// plus 16, the two words that packed nibbles keep together (r = lane / 4, t = lane % 4). Each
// position is a partial sum of its own.
template <class F, class X, int Tokens>
struct FloatTile {
  using Format = F;
  using Inputs = FloatInputs;
  static constexpr int kTokens = Tokens;
  static constexpr int kRows = kTileRows;
  static constexpr int kBlocks = Tokens == 1 ? 2 : 1;

  // Tokens past the end repeat the last one; their sums are not stored.
  __device__ __forceinline__ FloatTile(const bcy_gguf_matmul_args& args, const FloatInputs& inputs,
                                       int64_t first_token)
      : vectors(inputs.vectors) {
#pragma unroll
    for (int token = 0; token < Tokens; ++token) {
      x[token] = static_cast<const Storage*>(args.x) +
                 min(first_token + token, args.m - 1) * args.x_stride + threadIdx.x % 4 * 4;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[token][i][j] = 0.0f;
      }
    }
  }

  __device__ __forceinline__ void add_unit(const uint8_t* const (&rows)[2], int unit, int groups) {
    constexpr int kBlockGroups = Format::kElements / kGroup;
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int group = 0; group < kUnitGroups; ++group) {
      if (kBlockGroups == 1 && group >= groups) return;
      float weights[2][8];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint8_t* block = rows[i] + group / kBlockGroups * Format::kBytes;
        dequantize_word<Format>(block, group % kBlockGroups, t, weights[i]);
        dequantize_word<Format>(block, group % kBlockGroups, t + 4, weights[i] + 4);
      }
#pragma unroll
      for (int token = 0; token < Tokens; ++token) {
        float values[8];
        load_four(x[token] + unit * kUnit + group * kGroup, values);
        load_four(x[token] + unit * kUnit + group * kGroup + 16, values + 4);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            sums[token][i][j] = fma(weights[i][j], values[j], sums[token][i][j]);
          }
        }
      }
    }
  }

  // Element positions meet, halved: 16 apart in this lane, 8 and 4 apart in its neighbours, then 2
  // and 1.
  __device__ __forceinline__ void store(float (&partials)[kTileRows][kTokens]) const {
#pragma unroll
    for (int token = 0; token < Tokens; ++token) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float s[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          s[j] = add(sums[token][i][j], sums[token][i][j + 4]);
          s[j] = add(s[j], __shfl_xor_sync(~0u, s[j], 2));
          s[j] = add(s[j], __shfl_xor_sync(~0u, s[j], 1));
        }
        if (threadIdx.x % 4 == 0) {
          partials[threadIdx.x % 32 / 4 + 8 * i][token] = add(add(s[0], s[2]), add(s[1], s[3]));
        }
      }
    }
  }

 private:
  using Storage = typename X::Storage;
  struct alignas(4 * sizeof(Storage)) Four {
    Storage values[4];
  };

  __device__ __forceinline__ void load_four(const Storage* p, float* values) const {
    Four four;
    if (vectors) {
      four = *reinterpret_cast<const Four*>(p);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) four.values[i] = p[i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = X::load(&four.values[i]);
  }

  const Storage* x[Tokens];
  bool vectors;
  float sums[Tokens][2][8];
};

template <class Format>
int GgufOperations<Format>::matvec(const bcy_gguf_matmul_args& args, cudaStream_t stream) {
  return with_element(args.x_type, [&](auto x) {
    using X = decltype(x);
    constexpr int64_t kFour = 4 * sizeof(typename X::Storage);
    const FloatInputs inputs{reinterpret_cast<uintptr_t>(args.x) % kFour == 0 &&
                             (args.m == 1 || args.x_stride % 4 == 0)};
    if (args.m == 1) return launch_product<FloatTile<Format, X, 1>>(args, inputs, stream);
    return launch_product<FloatTile<Format, X, 4>>(args, inputs, stream);
  });
}

}  // namespace bcy
