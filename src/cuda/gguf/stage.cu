// SPDX-License-Identifier: Apache-2.0
// Activations to int8, in groups of 32, for the staged products: a kernel of its own.
#include "cuda/common/async.cuh"
#include "operations.h"
#include "staged.cuh"

namespace bcy {
namespace {

constexpr int kWarps = 4;

// Where the registers of products leave these blocks no room beside theirs, or rows are so few that
// half of the multiprocessors are free, all of these would crowd on the first that they come to.
// Each then asks for shared memory, of which Hopper's multiprocessors have enough for five.
constexpr int kSpread = 44 << 10;

template <class Record>
__global__ void __launch_bounds__(kWarps * 32)
    stage_kernel(const __grid_constant__ ProductArgs args, const __grid_constant__ Staged staged,
                 unsigned blocks_of_token, int* counts, int ncounts, bool late) {
  if (!late) let_next_kernel_start();
  const unsigned here = blockIdx.x / blocks_of_token, block = blockIdx.x % blocks_of_token;
  const int64_t first = int64_t{block} * kWarps + threadIdx.x / 32;
  wait_for_previous_kernel();
  if (late) let_next_kernel_start();
  for (int64_t i = int64_t{blockIdx.x} * (kWarps * 32) + threadIdx.x; i < ncounts;
       i += int64_t{gridDim.x} * (kWarps * 32)) {
    counts[i] = 0;
  }
  if (first >= staged.units) return;
  with_units<1>(
      args, staged.vectors, first, staged.units,
      [&](int64_t i, int64_t& token, int64_t& unit) {
        token = here;
        unit = i;
      },
      [&](const float (&x)[8], int64_t token, int64_t unit) {
        stage_unit<Record>(args, staged, x, staged.records, token, unit);
      });
}

}  // namespace

template <class Record>
int gguf_stage(const ProductArgs& args, const Staging& staging, cudaStream_t stream) {
  const Staged staged = staged_of(args, staging.turns, false);
  constexpr int kTokens = Record::kTokens;
  const bool few = kTokens <= kTileTokens && args.m <= kTileTokens;
  const int64_t tokens = few ? args.m : ceil_div(args.m, kTokens) * kTokens;
  const int64_t blocks_of_token = ceil_div(staged.units, kWarps);
  if (tokens > kMaxGridX / blocks_of_token) return BCY_ERROR_TOO_LARGE;
  return launch_beside(staging.beside, stage_kernel<Record>,
                       dim3(unsigned(tokens * blocks_of_token)), dim3(kWarps * 32), stream,
                       staging.spread ? kSpread : 0, staging.early, args, staged,
                       unsigned(blocks_of_token), staging.counts, staging.ncounts, staging.late);
}

#define BCY_STAGE(Record, Tokens, Sums) \
  template int gguf_stage<Record<Tokens, Sums>>(const ProductArgs&, const Staging&, cudaStream_t);
#define BCY_STAGE_SUMS(Record, Tokens) \
  BCY_STAGE(Record, Tokens, 0)         \
  BCY_STAGE(Record, Tokens, 1)         \
  BCY_STAGE(Record, Tokens, 8)         \
  BCY_STAGE(Record, Tokens, 16)
BCY_STAGE_SUMS(StagedRecord, 1)
BCY_STAGE_SUMS(StagedRecord, kTileTokens)
BCY_STAGE(WarpgroupRecord, 16, 0)
BCY_STAGE(WarpgroupRecord, 16, 1)
BCY_STAGE_SUMS(WarpgroupRecord, 32)
#undef BCY_STAGE_SUMS
#undef BCY_STAGE

}  // namespace bcy
