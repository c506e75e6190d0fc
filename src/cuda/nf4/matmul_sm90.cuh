// SPDX-License-Identifier: Apache-2.0
// The product of matmul.cuh for many rows and tokens on Hopper and later: the same bits.
//
// A warp has a ring of its own, of boxes that the copy engine fills: 16 rows of one unit. The warps
// of a block share the table of codes and hold the activations in shared memory for as long as the
// block lives. A cluster of blocks divides K where there are many tokens: then a block holds the
// activations of its part alone.
//
// Partial sum p belongs to block p / (8 / Cluster) of the cluster. Sums meet through distributed
// shared memory while the warps are at the next tile.
#pragma once

#include <algorithm>
#include <atomic>

#include "matmul.cuh"

namespace bcy {

constexpr int kNf4Warps = 16;
constexpr int kNf4Threads = kNf4Warps * 32;
constexpr int kNf4UnitBytes = kTileRows * kBoxBytes;  // of a warp
static_assert(kUnitBytes<Nf4Rows> == kBoxBytes);

// Tokens: 8, 16 or 32.
template <int Tokens, int Cluster>
struct Nf4Geometry {
  static constexpr int kPartialsHere = kPartials / Cluster;
  static constexpr int kRowGroups = kNf4Warps / kPartialsHere;
  static constexpr int kRows = kRowGroups * kTileRows;  // of a cluster's tile
  static constexpr int kRowsOut = kRows / Cluster;  // that a block writes of it
  static_assert(kRowsOut % kTileRows == 0);
  using Partials = float[kPartials][Tokens][kRowsOut + 4];
  static constexpr int kSumBytes = kPartials * Tokens * kRowsOut * int(sizeof(float));

  static constexpr int kUnitX = kUnit * 2 * Tokens;  // bytes of the activations of a unit
  // Offsets in shared memory.
  static constexpr int kBarriers = 0;  // four for tiles, kMaxStages for each warp
  static constexpr int kTable = 2048;
  static constexpr int kSums = kTable + kTableBytes;
  static constexpr int kX = kSums + 2 * int(sizeof(Partials));
  static_assert((4 + kNf4Warps * kMaxStages) * sizeof(uint64_t) <= kTable);

  static BCY_INLINE constexpr int rounds_of(int units) {
    return (units + kPartials - 1) / kPartials;
  }
  static BCY_INLINE constexpr int64_t ring_at(int units) {
    return (kX + int64_t{kPartialsHere * kUnitX} * rounds_of(units) + 1023) / 1024 * 1024;
  }
};

template <class X, int Tokens, int Cluster>
__global__ void __launch_bounds__(kNf4Threads, 1)
    nf4_product_sm90(const __grid_constant__ ProductArgs args,
                     const __grid_constant__ Nf4Inputs inputs,
                     const __grid_constant__ CUtensorMap matrix, int tiles, int stages) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  using G = Nf4Geometry<Tokens, Cluster>;
  using Partials = typename G::Partials;
  using UnitScales = bcy::UnitScales<kTileRows, 64, int>;
  constexpr int kOctets = kTileRows / 8;
  constexpr int kTiles = Tokens / 8;
  BCY_DYNAMIC_SHARED(shared);
  auto* const ready = reinterpret_cast<uint64_t*>(shared + G::kBarriers);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint64_t* const freed = ready + 2;
  uint64_t* const filled = freed + 2 + warp * kMaxStages;
  auto* const sums = reinterpret_cast<Partials*>(shared + G::kSums);
  const int units = int((args.ncols + kUnit - 1) / kUnit);
  const int rounds = G::rounds_of(units);
  uint8_t* const ring = shared + G::ring_at(units) + warp * stages * kNf4UnitBytes;
  const int rank = Cluster == 1 ? 0 : int(cluster_rank());
  const int here = warp % G::kPartialsHere;  // this warp's partial sum
  const int partial = rank * G::kPartialsHere + here;
  const int first_row = warp / G::kPartialsHere * kTileRows;  // in a tile
  const int own = units > partial ? (units - partial + kPartials - 1) / kPartials : 0;
  const int clusters = int(gridDim.x) / Cluster, cluster = int(blockIdx.x) / Cluster;

  if (lane == 0) {
    for (int i = 0; i < stages; ++i) barrier_init(&filled[i], 1);
    if (warp == 0) {
      for (int i = 0; i < 2; ++i) {
        barrier_init(&ready[i], Cluster == 1 ? kNf4Threads : 1);
        barrier_init(&freed[i], kNf4Warps * Cluster);
      }
    }
    barrier_init_fence();
    if (Cluster > 1 && warp == 0) {
      for (int i = 0; i < 2; ++i) expect_bytes(&ready[i], G::kSumBytes);
    }
  }
  __syncwarp();
  if constexpr (Cluster == 1) {
    __syncthreads();
  } else {
    cluster_sync();
  }

  // The units to come, by tile and round; one call of fetch each.
  int fetch_tile = cluster, fetch_round = 0;
  const auto fetch = [&](int stage) {
    if (own == 0 || fetch_tile >= tiles) return;
    const int row = fetch_tile * G::kRows + first_row;
    UnitScales::prefetch_unit(args, inputs, row, fetch_round * kPartials + partial);
    if (lane == 0) {
      expect_bytes(&filled[stage], kNf4UnitBytes);
      copy_box(ring + stage * kNf4UnitBytes, &matrix,
               (fetch_round * kPartials + partial) * kBoxBytes, row, &filled[stage]);
    }
    if (++fetch_round == own) {
      fetch_round = 0;
      fetch_tile += clusters;
    }
  };
  for (int i = 0; i < stages; ++i) fetch(i);
  UnitScales scales(args, inputs, cluster * G::kRows + first_row, partial);
  fill_table<kNf4Threads>(shared + G::kTable, inputs.codes, pair_of_halves);
  wait_for_previous_kernel();
  // Not before: the next kernel's weights would come ahead of this one's activations.
  let_next_kernel_start();
  // The activations of this block's partial sums: [partial][round][group][token][32].
  {
    constexpr int kPieces = kUnit / 8;  // of 16 bytes, of a token
    const int count = G::kPartialsHere * rounds * kPieces * Tokens;
    for (int i = threadIdx.x; i < count; i += kNf4Threads) {
      const int t = i % 4, token = i / 4 % Tokens, group = i / (4 * Tokens) % kUnitGroups;
      const int unit_here = i / (4 * Tokens * kUnitGroups);
      const int unit =
          unit_here % rounds * kPartials + rank * G::kPartialsHere + unit_here / rounds;
      const int k = unit * kUnit + group * kGroup + t * 8;
      uint4 x = {0, 0, 0, 0};
      if (token < args.m && k < args.ncols) {
        x = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(args.x) +
                                            token * args.x_stride + k);
      }
      *reinterpret_cast<uint4*>(shared + G::kX + i * 16) = x;
    }
  }
  __syncthreads();

  const uint8_t* const x_here = shared + G::kX + here * rounds * G::kUnitX;
  const Table table(shared + G::kTable);
  // The sums of tile number `done` of this cluster meet.
  const auto write = [&](int done) {
    constexpr int kCount = G::kRowsOut * Tokens;
    const int buffer = done % 2;
    const int first = (cluster + done * clusters) * G::kRows + rank * G::kRowsOut;
    barrier_wait(&ready[buffer], done / 2 % 2);
    if (Cluster > 1 && threadIdx.x == 0) expect_bytes(&ready[buffer], G::kSumBytes);
    for (int i = threadIdx.x; i < kCount; i += kNf4Threads) {
      const int row = first + i % G::kRowsOut;
      const int token = i / G::kRowsOut;
      if (row >= args.nrows || token >= args.m) continue;
      float p[kPartials];
#pragma unroll
      for (int j = 0; j < kPartials; ++j) p[j] = sums[buffer][j][token][i % G::kRowsOut];
      float y = meet(p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]);
      if (args.bias != nullptr) y = add(y, load_element(args.bias, row, args.y_type));
      store_element(args.y, token * args.y_stride + row, args.y_type, y);
    }
    if constexpr (Cluster > 1) {
      __syncwarp();
      if (lane < Cluster) arrive_in_cluster(in_block(shared_address(&freed[buffer]), lane));
    }
  };
  // Where this warp's rows meet.
  const uint32_t target = first_row / G::kRowsOut;
  const int first_out = first_row % G::kRowsOut;

  Nf4Sums<X, kOctets, kTiles, 64> tile_sums;
  int stage = 0, done = 0;
  uint32_t phase = 0;
  for (int tile = cluster; tile < tiles; tile += clusters, ++done) {
    tile_sums.clear();
    const int following = (tile + clusters) * G::kRows + first_row;
    for (int round = 0; round < own; ++round) {
      scales.take(inputs, round, round + 1 < own ? round + 1 : 0, following);
      barrier_wait(&filled[stage], phase);
      RowsOf<BoxBytes<4, kTileRows>, kTileRows> rows;
#pragma unroll
      for (int i = 0; i < kOctets; ++i) {
        rows.row[i] = {ring + stage * kNf4UnitBytes + lane / 4 * kBoxBytes + i * (8 * kBoxBytes),
                       uint32_t(lane / 4 * 16), 0, 0};
      }
      const uint8_t* const unit_x = x_here + round * G::kUnitX;
      tile_sums.add_unit(table, rows, scales, [&](int group, uint4(&x)[kTiles]) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          x[n] =
              *reinterpret_cast<const uint4*>(unit_x + group * (Tokens * 64) + n * 512 + lane * 16);
        }
      });
      __syncwarp();
      fetch(stage);
      if (++stage == stages) {
        stage = 0;
        phase ^= 1;
      }
    }
    // The sums of the tile before have met by now, or nearly. Blocks that are alone need no
    // `freed`: a warp that is here has read those of the tile before that.
    if (done > 0) write(done - 1);
    const int buffer = done % 2;
    if constexpr (Cluster == 1) {
      tile_sums.store([&](int token, int row, float sum) {
        sums[buffer][partial][token][first_out + row] = sum;
      });
      barrier_arrive(&ready[buffer]);
    } else {
      if (done > 1) barrier_wait(&freed[buffer], (done / 2 - 1) % 2);
      const uint32_t barrier = in_block(shared_address(&ready[buffer]), target);
      const uint32_t there = in_block(shared_address(&sums[buffer][partial][0][0]), target);
      tile_sums.store([&](int token, int row, float sum) {
        store_in_cluster(there + (token * (G::kRowsOut + 4) + first_out + row) * sizeof(float), sum,
                         barrier);
      });
    }
  }
  if (done > 0) write(done - 1);
  // No block may be gone while others read its sums.
  if constexpr (Cluster > 1) cluster_sync();
#endif
}

// How many clusters fit a device together.
struct ClustersAtOnce {
  std::atomic<uint64_t> last{0};  // device + 1, shared bytes, clusters: asked for once as a rule

  template <class Kernel>
  int operator()(Kernel* kernel, int cluster, int shared, int device, int processors) {
    const uint64_t key = uint64_t(device + 1) << 48 | uint64_t(shared) << 16;
    const uint64_t found = last.load(std::memory_order_relaxed);
    if (found >> 16 == key >> 16) return int(found & 0xffff);
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(cluster), 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(processors / cluster * cluster));
    config.blockDim = dim3(kNf4Threads);
    config.dynamicSmemBytes = shared;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) {
      cudaGetLastError();
      clusters = 0;
    }
    last.store(key | uint64_t(clusters), std::memory_order_relaxed);
    return clusters;
  }
};

// Tokens at a time. Does nothing where the rows are too few to keep all blocks busy, the
// activations too many for shared memory, or clusters not to be had.
template <class X, int Tokens, int Cluster>
int launch_nf4_sm90(const ProductArgs& args, const Nf4Inputs& inputs, const Device& device,
                    cudaStream_t stream, bool& launched) {
  using G = Nf4Geometry<Tokens, Cluster>;
  constexpr int kStageBytes = kNf4Warps * kNf4UnitBytes;
  const int64_t tiles = ceil_div(args.nrows, G::kRows);
  // Rows, those past the last tile too, are counted by an int.
  if (args.ncols > kMaxColumns || args.nrows > INT32_MAX / 2) return BCY_OK;
  const int64_t ring_at = G::ring_at(int(ceil_div(args.ncols, kUnit)));
  const int64_t most = (device.shared_per_block - ring_at) / kStageBytes;
  if (most < 2) return BCY_OK;
  const int stages = int(std::min(most, int64_t{kMaxStages}));
  const int shared = int(ring_at) + stages * kStageBytes;
  auto* const kernel = nf4_product_sm90<X, Tokens, Cluster>;
  if (const int status = allow_shared(kernel, device)) return status;
  int clusters = device.processors;
  if constexpr (Cluster > 1) {
    static ClustersAtOnce at_once;
    clusters = at_once(kernel, Cluster, shared, args.device, device.processors);
    if (clusters < 1) return BCY_OK;
  }
  if (tiles < 3 * int64_t{clusters}) return BCY_OK;
  CUtensorMap matrix;
  if (const int status = describe_boxes(args.weight, row_bytes<Nf4Rows>(args.ncols), args.nrows,
                                        kTileRows, false, matrix)) {
    return status;
  }
  launched = true;
  for (int64_t first = 0; first < args.m; first += Tokens) {
    const ProductArgs some = some_tokens(args, first, Tokens);
    const int status = launch_clusters(kernel, dim3(unsigned(clusters * Cluster)),
                                       dim3(kNf4Threads), stream, shared, args.overlap != 0,
                                       Cluster, some, inputs, matrix, int(tiles), stages);
    if (status != BCY_OK) return status;
  }
  return BCY_OK;
}

}  // namespace bcy
