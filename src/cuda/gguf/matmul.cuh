// SPDX-License-Identifier: Apache-2.0
// y[m, n] = sum_k weight[n, k] * x[m, k] on staged int8 activations.
//
// A thread block owns 16 weight rows and Tiles * 8 tokens. Warp p is partial sum p of the summation
// order: it takes units p, p + 8, ... of K, so that the weights are read once whatever the number
// of tokens, and the eight warps meet in shared memory. Two kernels differ in how weights arrive,
// never in what is added in which order:
//   matmul_streamed   a ninth warp keeps a ring of bulk copies in flight (Hopper and later, rows on
//   16-byte boundaries) matmul_direct     every lane loads what it needs
#pragma once

#include "baracuda/order.cuh"
#include "bulk.cuh"
#include "launch.cuh"
#include "mma.cuh"
#include "operations.h"
#include "staged.cuh"

namespace bcy {

constexpr int kTileRows = 16;
constexpr int kTileTokens = 8;
constexpr int kConsumers = kPartials * 32;  // threads
constexpr int64_t kMaxColumns = 1 << 28;  // offsets of a block's tokens fit an int

// Bytes of one row in one unit, and in one round of the eight partial sums.
template <class Format>
constexpr int kUnitBytes = kUnit / Format::kElements * Format::kBytes;
template <class Format>
constexpr int kRoundBytes = kPartials * kUnitBytes<Format>;

// The operands and sums that a lane holds: rows r and r + 8; as an operand token r of each tile, as
// sums tokens 2 t and 2 t + 1, where r = lane / 4 and t = lane % 4.
template <class Format, int Tiles>
struct LaneTile {
  const uint4* codes;  // of the first token, this lane's part
  const float* scales;
  const float* sums;
  int operand[Tiles];  // offsets from there, in units
  int column[Tiles][2];
  float partial[Tiles][4];

  // Tokens past the end repeat the last one; their sums are not stored.
  __device__ __forceinline__ LaneTile(const Staged& staged, int64_t first_token, int64_t m) {
    const int r = threadIdx.x % 32 / 4;
    const int t = threadIdx.x % 4;
    const int last = int(min(m - first_token, int64_t{Tiles * kTileTokens})) - 1;
    const int units = int(staged.units);
    codes =
        reinterpret_cast<const uint4*>(staged.codes + first_token * staged.units * kUnit) + 4 * t;
    scales = staged.scales + first_token * staged.units * kUnitGroups;
    sums = staged.sums + first_token * staged.units * kUnitGroups * Format::kMinima;
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
      operand[tile] = min(tile * kTileTokens + r, last) * units;
#pragma unroll
      for (int i = 0; i < 2; ++i)
        column[tile][i] = min(tile * kTileTokens + 2 * t + i, last) * units;
#pragma unroll
      for (int i = 0; i < 4; ++i) partial[tile][i] = 0.0f;
    }
  }

  // Adds one unit. rows: its first byte in row r and in row r + 8; groups: how many of its eight
  // exist.
  __device__ __forceinline__ void add_unit(const uint8_t* const (&rows)[2], int unit, int groups) {
    constexpr int kBlockGroups = Format::kElements / kGroup;
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int pair = 0; pair < kUnitGroups / 2; ++pair) {
      uint4 operands[Tiles];  // two groups
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile)
        operands[tile] = codes[(operand[tile] + unit) * (kUnit / 16) + pair];
#pragma unroll
      for (int in_pair = 0; in_pair < 2; ++in_pair) {
        const int group = 2 * pair + in_pair;
        if (kBlockGroups == 1 && group >= groups) return;
        const int g = group % kBlockGroups;
        const uint8_t* const blocks[2] = {rows[0] + group / kBlockGroups * Format::kBytes,
                                          rows[1] + group / kBlockGroups * Format::kBytes};
        const uint32_t a[4] = {Format::codes(blocks[0], g, t), Format::codes(blocks[1], g, t),
                               Format::codes(blocks[0], g, t + 4),
                               Format::codes(blocks[1], g, t + 4)};
        const float weight_scales[2] = {Format::scale(blocks[0], g), Format::scale(blocks[1], g)};
#pragma unroll
        for (int tile = 0; tile < Tiles; ++tile) {
          const uint32_t b[2] = {in_pair == 0 ? operands[tile].x : operands[tile].z,
                                 in_pair == 0 ? operands[tile].y : operands[tile].w};
          add_group_of_tile(tile, blocks, g, a, b, weight_scales, unit, group);
        }
      }
    }
  }

 private:
  __device__ __forceinline__ void add_group_of_tile(int tile, const uint8_t* const (&blocks)[2],
                                                    int g, const uint32_t (&a)[4],
                                                    const uint32_t (&b)[2],
                                                    const float (&weight_scales)[2], int unit,
                                                    int group) {
    int dots[4] = {};
    if constexpr (Format::kScaleElements == 16) {
      int second[4] = {};
      mma_half<Format::kUnsignedCodes>(dots, a[0], a[1], b[0]);
      mma_half<Format::kUnsignedCodes>(second, a[2], a[3], b[1]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        dots[i] = dots[i] * Format::half_scale(blocks[i / 2], g, 0) +
                  second[i] * Format::half_scale(blocks[i / 2], g, 1);
      }
    } else {
      mma_group<Format::kUnsignedCodes>(dots, a, b);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& sum = partial[tile][i];
      const int staged_group = (column[tile][i % 2] + unit) * kUnitGroups + group;
      sum = add_group(sum, dots[i], weight_scales[i / 2], scales[staged_group]);
      if constexpr (Format::kMinima > 0) {
#pragma unroll
        for (int half = 0; half < Format::kMinima; ++half) {
          const float staged_sum = sums[staged_group * Format::kMinima + half];
          sum = add_minimum(sum, Format::minimum(blocks[i / 2], g, half), staged_sum);
        }
      }
    }
  }
};

// The eight partial sums of a block's outputs meet in shared memory. Called by the consumers alone.
template <int Tiles>
struct Meeting {
  static constexpr int kTokens = Tiles * kTileTokens;
  float partials[kPartials][kTileRows][kTokens];

  template <class Lane>
  __device__ __forceinline__ void store(const Lane& lane) {
    const int r = threadIdx.x % 32 / 4;
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        partials[threadIdx.x / 32][r + i / 2 * 8][tile * kTileTokens + 2 * t + i % 2] =
            lane.partial[tile][i];
      }
    }
  }

  __device__ __forceinline__ void write(const bcy_gguf_matmul_args& args, int64_t first_row,
                                        int64_t first_token) const {
    for (int i = threadIdx.x; i < kTileRows * kTokens; i += kConsumers) {
      const int64_t row = first_row + i % kTileRows;
      const int64_t token = first_token + i / kTileRows;
      if (row >= args.nrows || token >= args.m) continue;
      float p[kPartials];
#pragma unroll
      for (int j = 0; j < kPartials; ++j) p[j] = partials[j][i % kTileRows][i / kTileRows];
      float y = meet(p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]);
      if (args.bias != nullptr) y = add(y, load_element(args.bias, row, args.y_type));
      store_element(args.y, token * args.y_stride + row, args.y_type, y);
    }
  }
};

BCY_INLINE int groups_of_unit(int unit, int groups) {
  const int left = groups - unit * kUnitGroups;
  return left < kUnitGroups ? left : kUnitGroups;
}

// ---- weights loaded by the lanes that use them -------------------------------------------------------------------

template <class Format, int Tiles>
__global__ void __launch_bounds__(kConsumers)
    matmul_direct(const __grid_constant__ bcy_gguf_matmul_args args,
                  const __grid_constant__ Staged staged, unsigned passes) {
  __shared__ Meeting<Tiles> meeting;
  const int groups = int(args.ncols / kGroup);
  const int64_t row_bytes = args.ncols / Format::kElements * Format::kBytes;
  const int64_t first_row = blockIdx.x / passes * int64_t{kTileRows};
  const int64_t first_token = blockIdx.x % passes * int64_t{Tiles * kTileTokens};
  // Rows past the end repeat the last one; they are not stored.
  const uint8_t* rows[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = min(first_row + threadIdx.x % 32 / 4 + 8 * i, args.nrows - 1);
    rows[i] = static_cast<const uint8_t*>(args.weight) + row * row_bytes;
  }
  LaneTile<Format, Tiles> lane(staged, first_token, args.m);
  for (int unit = threadIdx.x / 32; unit < staged.units; unit += kPartials) {
    const int64_t offset = int64_t{unit} * kUnitBytes<Format>;
    const uint8_t* const in_unit[2] = {rows[0] + offset, rows[1] + offset};
    lane.add_unit(in_unit, unit, groups_of_unit(unit, groups));
  }
  meeting.store(lane);
  __syncthreads();
  meeting.write(args, first_row, first_token);
}

// ---- weights streamed through shared memory ---------------------------------------------------------------------

// A stage of the ring is 16 rows of one round. Their distance is an odd multiple of 16 bytes, so
// that a word of eight rows at a time is read without bank conflicts.
template <class Format>
struct Ring {
  static constexpr int kPitch = kRoundBytes<Format> + (kRoundBytes<Format> % 32 == 16 ? 0 : 16);
  static constexpr int kStageBytes = kTileRows * kPitch;
  static constexpr int kStages = kStageBytes > 30000 ? 2 : 3;
};

template <class Format, int Tiles>
constexpr int kStreamedShared = Ring<Format>::kStages * Ring<Format>::kStageBytes >
                                        int(sizeof(Meeting<Tiles>))
                                    ? Ring<Format>::kStages * Ring<Format>::kStageBytes
                                    : int(sizeof(Meeting<Tiles>));

template <class Format, int Tiles>
__global__ void __launch_bounds__(kConsumers + 32, Tiles == 1   ? 3
                                                   : Tiles == 2 ? 2
                                                                : 1)
    matmul_streamed(const __grid_constant__ bcy_gguf_matmul_args args,
                    const __grid_constant__ Staged staged, unsigned passes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  using R = Ring<Format>;
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ uint64_t filled[R::kStages], emptied[R::kStages];
  const int warp = threadIdx.x / 32;
  const int groups = int(args.ncols / kGroup);
  const int64_t row_bytes = args.ncols / Format::kElements * Format::kBytes;
  const int64_t first_row = blockIdx.x / passes * int64_t{kTileRows};
  const int64_t first_token = blockIdx.x % passes * int64_t{Tiles * kTileTokens};
  const int rounds = int((staged.units + kPartials - 1) / kPartials);

  if (threadIdx.x == kConsumers) {
    for (int i = 0; i < R::kStages; ++i) {
      barrier_init(&filled[i], 1);
      barrier_init(&emptied[i], kPartials);
    }
    barrier_init_fence();
  }
  __syncthreads();

  if (warp == kPartials) {
    // Rows past the end are left out of the copies; what their lanes compute is not stored.
    const int rows = int(min(int64_t{kTileRows}, args.nrows - first_row));
    const int lane = threadIdx.x % 32;
    const uint8_t* row = static_cast<const uint8_t*>(args.weight) + (first_row + lane) * row_bytes;
    for (int round = 0; round < rounds; ++round) {
      const int stage = round % R::kStages;
      if (round >= R::kStages) barrier_wait(&emptied[stage], uint32_t(round / R::kStages - 1) & 1u);
      const int64_t offset = int64_t{round} * kRoundBytes<Format>;
      const uint32_t bytes = uint32_t(min(int64_t{kRoundBytes<Format>}, row_bytes - offset));
      if (lane == 0) barrier_arrive_expecting(&filled[stage], bytes * rows);
      __syncwarp();
      if (lane < rows) {
        bulk_copy(shared + stage * R::kStageBytes + lane * R::kPitch, row + offset, bytes,
                  &filled[stage]);
      }
    }
    return;
  }

  LaneTile<Format, Tiles> lane(staged, first_token, args.m);
  for (int round = 0; round < rounds; ++round) {
    const int stage = round % R::kStages;
    const int unit = round * kPartials + warp;
    barrier_wait(&filled[stage], uint32_t(round / R::kStages) & 1u);
    if (unit < staged.units) {
      const uint8_t* first = shared + stage * R::kStageBytes + threadIdx.x % 32 / 4 * R::kPitch +
                             warp * kUnitBytes<Format>;
      const uint8_t* const in_unit[2] = {first, first + 8 * R::kPitch};
      lane.add_unit(in_unit, unit, groups_of_unit(unit, groups));
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(&emptied[stage]);
  }
  // The ring has served; its memory takes the sums. Only consumers are left.
  auto& meeting = *reinterpret_cast<Meeting<Tiles>*>(shared);
  asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory");
  meeting.store(lane);
  asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory");
  meeting.write(args, first_row, first_token);
#endif
}

// ---- launch -----------------------------------------------------------------------------------------------------

inline int device_major(int device, int* major) {
  return cudaDeviceGetAttribute(major, cudaDevAttrComputeCapabilityMajor, device);
}

template <class Format, int Tiles>
int launch_matmul(const bcy_gguf_matmul_args& args, cudaStream_t stream) {
  const int64_t row_bytes = args.ncols / Format::kElements * Format::kBytes;
  // Blocks of the same rows follow each other, so that later tokens find the weights in the L2
  // cache.
  const int64_t passes = ceil_div(args.m, Tiles * kTileTokens);
  if (ceil_div(args.nrows, kTileRows) > kMaxGridX / passes || args.ncols > kMaxColumns)
    return BCY_ERROR_TOO_LARGE;
  const dim3 grid{unsigned(ceil_div(args.nrows, kTileRows) * passes)};
  const Staged staged = staged_planes(args.workspace, args.ncols, args.m);
  int major = 0;
  if (const int status = device_major(args.device, &major)) return status;
  const bool on_boundaries =
      row_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(args.weight) % 16 == 0;
  if (major >= 9 && on_boundaries && args.ncols > 0) {
    constexpr int kShared = kStreamedShared<Format, Tiles>;
    auto* kernel = matmul_streamed<Format, Tiles>;
    if (const int status = allow_shared(kernel, kShared)) return status;
    return launch(kernel, grid, dim3(kConsumers + 32), stream, kShared, args, staged,
                  unsigned(passes));
  }
  return launch(matmul_direct<Format, Tiles>, grid, dim3(kConsumers), stream, 0, args, staged,
                unsigned(passes));
}

template <class Format>
int GgufOperations<Format>::matmul(const bcy_gguf_matmul_args& args, cudaStream_t stream) {
  if (args.m <= 8) return launch_matmul<Format, 1>(args, stream);
  if (args.m <= 16) return launch_matmul<Format, 2>(args, stream);
  return launch_matmul<Format, 4>(args, stream);
}

}  // namespace bcy
