// SPDX-License-Identifier: Apache-2.0
// Activations to int8, in groups of 32, for the staged products: a kernel of its own.
#include "cuda/common/async.cuh"
#include "operations.h"
#include "staged.cuh"

namespace bcy {
namespace {

constexpr int kWarps = 4;

template <int Tokens, int Minima>
__global__ void __launch_bounds__(kWarps * 32)
    stage_kernel(const __grid_constant__ bcy_gguf_matmul_args args,
                 const __grid_constant__ Staged staged, int64_t count) {
  let_next_kernel_start();
  const int64_t index = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (index >= count) return;
  wait_for_previous_kernel();
  stage_units<Tokens, Minima, 1>(args, staged, staged.records, index, count,
                                 [&](int64_t i, int64_t& token, int64_t& unit) {
                                   token = i / staged.units;
                                   unit = i % staged.units;
                                 });
}

template <int Tokens>
int stage(const bcy_gguf_matmul_args& args, int minima, bool turns, cudaStream_t stream) {
  const Staged staged = staged_of(args, turns, false);
  const int64_t tokens = args.m <= kTileTokens ? args.m : token_tiles(args.m) * kTileTokens;
  const int64_t count = tokens * staged.units;
  const int64_t blocks = ceil_div(count, kWarps);
  if (blocks > kMaxGridX) return BCY_ERROR_TOO_LARGE;
  auto* kernel = minima == 0   ? stage_kernel<Tokens, 0>
                 : minima == 1 ? stage_kernel<Tokens, 1>
                               : stage_kernel<Tokens, 2>;
  return launch(kernel, dim3(unsigned(blocks)), dim3(kWarps * 32), stream, 0, args.overlap != 0,
                args, staged, count);
}

}  // namespace

int gguf_stage(const bcy_gguf_matmul_args& args, int minima, bool turns, bool single,
               cudaStream_t stream) {
  return single ? stage<1>(args, minima, turns, stream)
                : stage<kTileTokens>(args, minima, turns, stream);
}

}  // namespace bcy
