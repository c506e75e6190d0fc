// SPDX-License-Identifier: Apache-2.0
// How weights reach the products, and how their partial sums meet: the same for staged and for
// float activations.
//
// A thread block owns some weight rows and tokens. Warp p is partial sum p of the summation
// order: it takes units p, p + 8, ... of K, so that the weights are read once whatever the number
// of tokens, and the eight warps meet in shared memory. Two kernels differ in how weights arrive,
// never in what is added in which order:
//   product_streamed  a ninth warp keeps a ring of bulk copies in flight (Hopper and later, rows on
//   16-byte boundaries) product_direct    every lane loads what it needs
//
// What a lane adds up is a Tile: a struct with
//   Format, Inputs                   weights, activations
//   kRows, kTokens                   of a thread block; rows are a multiple of 16
//   kBlocks                          thread blocks that should fit a multiprocessor
//   Tile(args, inputs, first_token)  sums at zero
//   add_unit(rows, unit, groups)     rows: first byte of the unit in rows r and r + 8, r = lane /
//   4; groups: how many exist store(partials)                  this warp's sums, [row][token]
#pragma once

#include "baracuda/order.cuh"
#include "bulk.cuh"
#include "launch.cuh"

namespace bcy {

constexpr int kTileRows = 16;
constexpr int kConsumers = kPartials * 32;  // threads
constexpr int64_t kMaxColumns = 1 << 28;  // offsets inside a block's tokens fit an int

// Bytes of one row in one unit, and in one round of the eight partial sums.
template <class Format>
constexpr int kUnitBytes = kUnit / Format::kElements * Format::kBytes;
template <class Format>
constexpr int kRoundBytes = kPartials * kUnitBytes<Format>;

template <class Format>
BCY_INLINE int64_t row_bytes(int64_t ncols) {
  return ncols / Format::kElements * Format::kBytes;
}

BCY_INLINE int groups_of_unit(int unit, int groups) {
  const int left = groups - unit * kUnitGroups;
  return left < kUnitGroups ? left : kUnitGroups;
}

// Where a block's eight partial sums meet. Called by the consumers alone.
template <int Rows, int Tokens>
struct Meeting {
  float partials[kPartials][Rows][Tokens];

  __device__ __forceinline__ void write(const bcy_gguf_matmul_args& args, int64_t first_row,
                                        int64_t first_token) const {
    for (int i = threadIdx.x; i < Rows * Tokens; i += kConsumers) {
      const int64_t row = first_row + i % Rows;
      const int64_t token = first_token + i / Rows;
      if (row >= args.nrows || token >= args.m) continue;
      float p[kPartials];
#pragma unroll
      for (int j = 0; j < kPartials; ++j) p[j] = partials[j][i % Rows][i / Rows];
      float y = meet(p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]);
      if (args.bias != nullptr) y = add(y, load_element(args.bias, row, args.y_type));
      store_element(args.y, token * args.y_stride + row, args.y_type, y);
    }
  }
};

// ---- weights loaded by the lanes that use them -------------------------------------------------------------------

template <class Tile>
__global__ void __launch_bounds__(kConsumers)
    product_direct(const __grid_constant__ bcy_gguf_matmul_args args,
                   const __grid_constant__ typename Tile::Inputs inputs, unsigned passes) {
  using Format = typename Tile::Format;
  __shared__ Meeting<Tile::kRows, Tile::kTokens> meeting;
  const int groups = int(args.ncols / kGroup);
  const int64_t first_row = blockIdx.x / passes * int64_t{Tile::kRows};
  const int64_t first_token = blockIdx.x % passes * int64_t{Tile::kTokens};
  // Rows past the end repeat the last one; they are not stored.
  const uint8_t* rows[Tile::kRows / 8];
#pragma unroll
  for (int i = 0; i < Tile::kRows / 8; ++i) {
    const int64_t row = min(first_row + threadIdx.x % 32 / 4 + 8 * i, args.nrows - 1);
    rows[i] = static_cast<const uint8_t*>(args.weight) + row * row_bytes<Format>(args.ncols);
  }
  Tile tile(args, inputs, first_token);
  for (int unit = threadIdx.x / 32; unit * kUnitGroups < groups; unit += kPartials) {
    const int64_t offset = int64_t{unit} * kUnitBytes<Format>;
    const uint8_t* in_unit[Tile::kRows / 8];
#pragma unroll
    for (int i = 0; i < Tile::kRows / 8; ++i) in_unit[i] = rows[i] + offset;
    tile.add_unit(in_unit, unit, groups_of_unit(unit, groups));
  }
  tile.store(meeting.partials[threadIdx.x / 32]);
  __syncthreads();
  meeting.write(args, first_row, first_token);
}

// ---- weights streamed through shared memory ---------------------------------------------------------------------

// A stage of the ring is one round of the block's rows. Their distance is an odd multiple of 16
// bytes, so that a word of eight rows at a time is read without bank conflicts.
template <class Tile>
struct Ring {
  static constexpr int kRound = kRoundBytes<typename Tile::Format>;
  static constexpr int kPitch = kRound + (kRound % 32 == 16 ? 0 : 16);
  static constexpr int kStageBytes = Tile::kRows * kPitch;
  static constexpr int kStages = kStageBytes > 30000 ? 2 : 3;
  static constexpr int kMeetingBytes = sizeof(Meeting<Tile::kRows, Tile::kTokens>);
  static constexpr int kSharedBytes =
      kStages * kStageBytes > kMeetingBytes ? kStages * kStageBytes : kMeetingBytes;
};

template <class Tile>
__global__ void __launch_bounds__(kConsumers + 32, Tile::kBlocks)
    product_streamed(const __grid_constant__ bcy_gguf_matmul_args args,
                     const __grid_constant__ typename Tile::Inputs inputs, unsigned passes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  using Format = typename Tile::Format;
  using R = Ring<Tile>;
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ uint64_t filled[R::kStages], emptied[R::kStages];
  const int warp = threadIdx.x / 32;
  const int groups = int(args.ncols / kGroup);
  const int rounds = (groups + kPartials * kUnitGroups - 1) / (kPartials * kUnitGroups);
  const int64_t bytes_of_row = row_bytes<Format>(args.ncols);
  const int64_t first_row = blockIdx.x / passes * int64_t{Tile::kRows};
  const int64_t first_token = blockIdx.x % passes * int64_t{Tile::kTokens};

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
    const int rows = int(min(int64_t{Tile::kRows}, args.nrows - first_row));
    const int lane = threadIdx.x % 32;
    const uint8_t* row =
        static_cast<const uint8_t*>(args.weight) + (first_row + lane) * bytes_of_row;
    for (int round = 0; round < rounds; ++round) {
      const int stage = round % R::kStages;
      if (round >= R::kStages) {
        barrier_wait(&emptied[stage], uint32_t(round / R::kStages - 1) & 1u);
      }
      const int64_t offset = int64_t{round} * kRoundBytes<Format>;
      const uint32_t bytes = uint32_t(min(int64_t{kRoundBytes<Format>}, bytes_of_row - offset));
      if (lane == 0) barrier_arrive_expecting(&filled[stage], bytes * rows);
      __syncwarp();
      if (lane < rows) {
        bulk_copy(shared + stage * R::kStageBytes + lane * R::kPitch, row + offset, bytes,
                  &filled[stage]);
      }
    }
    return;
  }

  Tile tile(args, inputs, first_token);
  for (int round = 0; round < rounds; ++round) {
    const int stage = round % R::kStages;
    const int unit = round * kPartials + warp;
    barrier_wait(&filled[stage], uint32_t(round / R::kStages) & 1u);
    if (unit * kUnitGroups < groups) {
      const uint8_t* first = shared + stage * R::kStageBytes + threadIdx.x % 32 / 4 * R::kPitch +
                             warp * kUnitBytes<Format>;
      const uint8_t* in_unit[Tile::kRows / 8];
#pragma unroll
      for (int i = 0; i < Tile::kRows / 8; ++i) in_unit[i] = first + 8 * i * R::kPitch;
      tile.add_unit(in_unit, unit, groups_of_unit(unit, groups));
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(&emptied[stage]);
  }
  // The ring has served; its memory takes the sums. Only consumers are left.
  auto& meeting = *reinterpret_cast<Meeting<Tile::kRows, Tile::kTokens>*>(shared);
  consumers_sync<kConsumers>();
  tile.store(meeting.partials[warp]);
  consumers_sync<kConsumers>();
  meeting.write(args, first_row, first_token);
#endif
}

// ---- launch -----------------------------------------------------------------------------------------------------

template <class Tile>
int launch_product(const bcy_gguf_matmul_args& args, const typename Tile::Inputs& inputs,
                   cudaStream_t stream) {
  // Blocks of the same rows follow each other, so that later tokens find the weights in the L2
  // cache.
  const int64_t passes = ceil_div(args.m, Tile::kTokens);
  const int64_t blocks = ceil_div(args.nrows, Tile::kRows);
  if (blocks > kMaxGridX / passes || args.ncols > kMaxColumns) return BCY_ERROR_TOO_LARGE;
  const dim3 grid{unsigned(blocks * passes)};
  int major = 0;
  if (const int status =
          cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, args.device)) {
    return status;
  }
  const bool on_boundaries = row_bytes<typename Tile::Format>(args.ncols) % 16 == 0 &&
                             reinterpret_cast<uintptr_t>(args.weight) % 16 == 0;
  if (major >= 9 && on_boundaries && args.ncols > 0) {
    auto* kernel = product_streamed<Tile>;
    if (const int status = allow_shared(kernel, Ring<Tile>::kSharedBytes)) return status;
    return launch(kernel, grid, dim3(kConsumers + 32), stream, Ring<Tile>::kSharedBytes, args,
                  inputs, unsigned(passes));
  }
  return launch(product_direct<Tile>, grid, dim3(kConsumers), stream, 0, args, inputs,
                unsigned(passes));
}

}  // namespace bcy
