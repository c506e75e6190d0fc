// SPDX-License-Identifier: Apache-2.0
// y from the sums of units that exact_sm90.cuh leaves in the workspace: the last steps of the
// order.
#include "baracuda/order.cuh"
#include "cuda/common/async.cuh"
#include "operations.h"

namespace bcy {
namespace {

// Warp p has partial sum p of 32 rows.
constexpr int kRows = 32;

__global__ void __launch_bounds__(kPartials* kRows)
    add_units(const __grid_constant__ ProductArgs args, unsigned blocks_of_token) {
  __shared__ float partials[kPartials][kRows];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int partial = threadIdx.x / kRows, lane = threadIdx.x % kRows;
  const int units = int(unit_count(args.ncols));
  const int64_t token = blockIdx.x / blocks_of_token;
  const int64_t row = blockIdx.x % blocks_of_token * int64_t{kRows} + lane;
  const float* const sums =
      static_cast<const float*>(args.workspace) + token * units * args.nrows + row;
  float sum = 0.0f;
  if (row < args.nrows) {
#pragma unroll 8
    for (int unit = partial; unit < units; unit += kPartials) {
      sum = add(sum, sums[unit * args.nrows]);
    }
  }
  partials[partial][lane] = sum;
  __syncthreads();
  if (partial > 0 || row >= args.nrows) return;
  float p[kPartials];
#pragma unroll
  for (int i = 0; i < kPartials; ++i) p[i] = partials[i][lane];
  store_output(args, token, row, meet(p));
}

}  // namespace

int nf4_add_units(const ProductArgs& args, cudaStream_t stream) {
  const int64_t blocks_of_token = ceil_div(args.nrows, kRows);
  if (args.m > kMaxGridX / blocks_of_token) return BCY_ERROR_TOO_LARGE;
  return launch(add_units, dim3(unsigned(args.m * blocks_of_token)), dim3(kPartials * kRows),
                stream, 0, true, args, unsigned(blocks_of_token));
}

}  // namespace bcy
