// SPDX-License-Identifier: Apache-2.0
// Activations to int8, in groups of 32, for the staged products.
#include "launch.cuh"
#include "operations.h"
#include "staged.cuh"

namespace bcy {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 8;  // lanes of a group, four elements each

// Minima: how many sums a group needs (0, 1, or 2 for one per half).
template <class X, int Minima>
__global__ void __launch_bounds__(kThreads)
    stage_kernel(const __grid_constant__ bcy_gguf_matmul_args args,
                 const __grid_constant__ Staged staged) {
  const int64_t groups =
      staged.units * kUnitGroups;  // of a token, those that only fill up its last unit included
  const int64_t index = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kLanes;
  const int lane = threadIdx.x % kLanes;
  const int64_t token = index / groups;
  const int64_t group = index % groups;
  // A warp holds whole groups, and lanes past the end take part in the shuffles.
  const bool active = token < args.m && group * kGroup < args.ncols;

  float x[4] = {};
  if (active) {
    const auto* row = static_cast<const typename X::Storage*>(args.x) + token * args.x_stride;
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = X::load(row + group * kGroup + 4 * lane + i);
  }

  float largest = 0.0f;
  bool finite = true;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    largest = fmaxf(largest, fabsf(x[i]));
    finite = finite && is_finite(x[i]);
  }
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
    finite = __shfl_xor_sync(~0u, finite, offset) && finite;
  }
  const GroupScale scale = group_scale(largest, finite);

  uint32_t word = 0;
  int sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int u = stage_element(x[i], scale);
    word |= (uint32_t(u) & 0xffu) << 8 * i;
    sum += u;
  }
  if constexpr (Minima > 0) {
#pragma unroll
    for (int offset = kLanes / 2 / Minima; offset > 0; offset /= 2)
      sum += __shfl_xor_sync(~0u, sum, offset);
  }
  if (token >= args.m) return;
  const int in_unit = int(group % kUnitGroups);
  int8_t* unit = staged.codes + (index - in_unit) * kGroup;
  *reinterpret_cast<uint32_t*>(unit + staged_offset(in_unit, lane)) = word;
  if (lane == 0) staged.scales[index] = scale.scale;
  if constexpr (Minima > 0) {
    constexpr int kSumLanes = kLanes / Minima;
    if (lane % kSumLanes == 0)
      staged.sums[index * Minima + lane / kSumLanes] = staged_sum(scale, sum);
  }
}

template <class X>
int stage(const bcy_gguf_matmul_args& args, int minima, cudaStream_t stream) {
  const Staged staged = staged_planes(args.workspace, args.ncols, args.m);
  const int64_t blocks = ceil_div(args.m * staged.units * kUnitGroups, kThreads / kLanes);
  if (blocks > kMaxGridX) return BCY_ERROR_TOO_LARGE;
  auto* kernel = minima == 0   ? stage_kernel<X, 0>
                 : minima == 1 ? stage_kernel<X, 1>
                               : stage_kernel<X, 2>;
  return launch(kernel, dim3(unsigned(blocks)), dim3(kThreads), stream, 0, args, staged);
}

}  // namespace

int gguf_stage(const bcy_gguf_matmul_args& args, int minima, cudaStream_t stream) {
  return with_element(args.x_type,
                      [&](auto x) { return stage<decltype(x)>(args, minima, stream); });
}

}  // namespace bcy
