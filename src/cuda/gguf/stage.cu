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
    stage_kernel(const __grid_constant__ ProductArgs args, const __grid_constant__ Staged staged,
                 unsigned blocks_of_token) {
  let_next_kernel_start();
  const unsigned here = blockIdx.x / blocks_of_token, block = blockIdx.x % blocks_of_token;
  const int64_t first = int64_t{block} * kWarps + threadIdx.x / 32;
  if (first >= staged.units) return;
  wait_for_previous_kernel();
  stage_units<Tokens, Minima, 1>(args, staged, staged.records, first, staged.units,
                                 [&](int64_t i, int64_t& token, int64_t& unit) {
                                   token = here;
                                   unit = i;
                                 });
}

template <int Tokens>
int stage(const ProductArgs& args, int minima, bool turns, cudaStream_t stream) {
  const Staged staged = staged_of(args, turns, false);
  const int64_t tokens = args.m <= kTileTokens ? args.m : token_tiles(args.m) * kTileTokens;
  const int64_t blocks_of_token = ceil_div(staged.units, kWarps);
  if (tokens > kMaxGridX / blocks_of_token) return BCY_ERROR_TOO_LARGE;
  auto* kernel = minima == 0   ? stage_kernel<Tokens, 0>
                 : minima == 1 ? stage_kernel<Tokens, 1>
                               : stage_kernel<Tokens, 2>;
  return launch(kernel, dim3(unsigned(tokens * blocks_of_token)), dim3(kWarps * 32), stream, 0,
                args.overlap != 0, args, staged, unsigned(blocks_of_token));
}

}  // namespace

int gguf_stage(const ProductArgs& args, int minima, bool turns, bool single, cudaStream_t stream) {
  return single ? stage<1>(args, minima, turns, stream)
                : stage<kTileTokens>(args, minima, turns, stream);
}

}  // namespace bcy
