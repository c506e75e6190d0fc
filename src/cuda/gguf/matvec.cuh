// SPDX-License-Identifier: Apache-2.0
// y[m, n] = sum_k weight[n, k] * x[m, k] on float activations.
//
// A warp owns one weight row and Tokens tokens. Lane 4 p + q is partial sum p of the summation
// order and holds eight element positions of a group: 4 q .. 4 q + 3 and those plus 16, the two
// words that packed nibbles keep together.
#pragma once

#include "baracuda/order.cuh"
#include "launch.cuh"
#include "operations.h"

namespace bcy {

constexpr int kMatvecWarps = 4;

template <class Format, class X, int Tokens>
__global__ void __launch_bounds__(kMatvecWarps * 32)
    matvec_kernel(const __grid_constant__ bcy_gguf_matmul_args args) {
  constexpr int kBlockGroups = Format::kElements / kGroup;
  const int64_t row = int64_t{blockIdx.x} * kMatvecWarps + threadIdx.x / 32;
  if (row >= args.nrows) return;
  const int p = threadIdx.x % 32 / 4;
  const int q = threadIdx.x % 4;
  const int64_t groups = args.ncols / kGroup;
  const uint8_t* blocks = static_cast<const uint8_t*>(args.weight) +
                          row * (args.ncols / Format::kElements * Format::kBytes);

  for (int64_t first_token = int64_t{blockIdx.y} * Tokens; first_token < args.m;
       first_token += int64_t{gridDim.y} * Tokens) {
    const typename X::Storage* x[Tokens];
#pragma unroll
    for (int i = 0; i < Tokens; ++i) {
      const int64_t token = min(first_token + i, args.m - 1);
      x[i] = static_cast<const typename X::Storage*>(args.x) + token * args.x_stride + 4 * q;
    }
    float sums[Tokens][8] = {};
    for (int64_t unit = p; unit * kUnitGroups < groups; unit += kPartials) {
      const int64_t end = min(groups, (unit + 1) * kUnitGroups);
#pragma unroll 4
      for (int64_t group = unit * kUnitGroups; group < end; ++group) {
        const uint8_t* block = blocks + group / kBlockGroups * Format::kBytes;
        const int g = int(group % kBlockGroups);
        float weights[8];
        dequantize_word<Format>(block, g, q, weights);
        dequantize_word<Format>(block, g, q + 4, weights + 4);
#pragma unroll
        for (int i = 0; i < Tokens; ++i) {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const float value = X::load(x[i] + group * kGroup + j / 4 * 16 + j % 4);
            sums[i][j] = fma(weights[j], value, sums[i][j]);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < Tokens; ++i) {
      float (&s)[8] = sums[i];
      // Element positions, halved: 16 apart in this lane, then 8 and 4 apart in its neighbours,
      // then 2 and 1.
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        s[j] = add(s[j], s[j + 4]);
        s[j] = add(s[j], __shfl_xor_sync(~0u, s[j], 2));
        s[j] = add(s[j], __shfl_xor_sync(~0u, s[j], 1));
      }
      float y = add(add(s[0], s[2]), add(s[1], s[3]));
      // The tree of meet(): partials 4 apart, then 2, then 1.
      y = add(y, __shfl_xor_sync(~0u, y, 16));
      y = add(y, __shfl_xor_sync(~0u, y, 8));
      y = add(y, __shfl_xor_sync(~0u, y, 4));
      if (threadIdx.x % 32 == 0 && first_token + i < args.m) {
        if (args.bias != nullptr) y = add(y, load_element(args.bias, row, args.y_type));
        store_element(args.y, (first_token + i) * args.y_stride + row, args.y_type, y);
      }
    }
  }
}

template <class Format>
int GgufOperations<Format>::matvec(const bcy_gguf_matmul_args& args, cudaStream_t stream) {
  const int64_t blocks = ceil_div(args.nrows, kMatvecWarps);
  if (blocks > kMaxGridX) return BCY_ERROR_TOO_LARGE;
  return with_element(args.x_type, [&](auto x) {
    using X = decltype(x);
    const auto with_tokens = [&](auto* kernel, int tokens) {
      const int64_t passes = min(ceil_div(args.m, tokens), kMaxGridY);
      return launch(kernel, dim3(unsigned(blocks), unsigned(passes)), dim3(kMatvecWarps * 32),
                    stream, 0, args);
    };
    if (args.m == 1) return with_tokens(matvec_kernel<Format, X, 1>, 1);
    return with_tokens(matvec_kernel<Format, X, 4>, 4);
  });
}

}  // namespace bcy
