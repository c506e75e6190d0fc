// SPDX-License-Identifier: Apache-2.0
// The product of matmul.cuh for many rows and more than four tokens on Hopper: the same bits.
//
// A thread block takes 128 rows and all of K, 32 rows to each of four warpgroups, 8 to a warp,
// whose high and low parts are the 16 of an instruction. The copy engine brings the codes of a
// unit, its scales where they can be boxed, and the activations, which a kernel before has put into
// the workspace in the order in which tensor cores read them.
//
// Where rows are few, a block takes 32 of them, and its warpgroups divide K. Where they are fewer
// still, two blocks divide it as well, and meet in the workspace.
#pragma once

#include <algorithm>

#include "cuda/common/parts.cuh"
#include "cuda/common/warpgroup.cuh"
#include "matmul.cuh"
#include "operations.h"

namespace bcy {

// Tokens: 8, 16 or 32. Parts: of K, which warpgroups of a block divide. What it holds in shared
// memory.
template <int Tokens, int Parts>
struct Nf4Boxes : PartWarps<Parts> {
  using Warps = PartWarps<Parts>;
  using Sums = PartSums<Parts, Tokens / 4>;
  static constexpr int kTokens = Tokens;
  static constexpr int kRows = Warps::kPartWarps * 8;

  // Bytes of a stage of the ring, a unit: codes, activations, scales.
  static constexpr int kCodes = kRows * kBoxBytes;
  static constexpr int kX = kUnitChunks * kWarpgroupX<Tokens>;
  static constexpr int kScales = kRows * kScaleBox;
  // A swizzled box begins at a multiple of its pattern.
  static constexpr int kStage = (kCodes + kX + kScales + 1023) / 1024 * 1024;
  static_assert(kWarpgroupElements == kChunk);

  // Offsets: barriers, the code of nested scales, the table, where sums meet, the ring.
  static constexpr int kCode = 1024;
  static constexpr int kTable = 2048;
  static constexpr int kMeeting = kTable + kTableBytes;
  static constexpr int kRing = kMeeting + Sums::kBytes;
  static_assert(2 * Warps::kMostStages * sizeof(uint64_t) <= kCode);
  static_assert(kRing % 1024 == 0);
};

// Tokens at a time.
inline int nf4_tokens(int64_t m) { return m > 16 ? 32 : m > 8 ? 16 : 8; }

// Calls function(Nf4Boxes<...>{}) for as many tokens and parts as a product has at a time; eight
// tokens have one part.
template <class Function>
auto with_nf4_boxes(int tokens, int parts, Function&& function) {
  if (tokens == 8) return function(Nf4Boxes<8, 1>{});
  if (tokens == 16) return parts == 1 ? function(Nf4Boxes<16, 1>{}) : function(Nf4Boxes<16, 4>{});
  return parts == 1 ? function(Nf4Boxes<32, 1>{}) : function(Nf4Boxes<32, 4>{});
}

// Other kernels need less to begin with, fewer rows to keep all multiprocessors busy, and gain less
// from more tokens. GPUs after Hopper have these alone.
inline Division divide_nf4(const bcy_nf4_weight& weight, int64_t m, const Device& device) {
  Division division;
  if (device.arch < 900 || device.own_arch != 900 || weight.block_size < kChunk ||
      weight.ncols > kMaxColumns || weight.nrows > INT32_MAX / 2 || m <= 4 || weight.nrows == 0 ||
      weight.ncols == 0) {
    return division;
  }
  const int64_t units = ceil_div(weight.ncols, kUnit);
  const int64_t share = weight.nrows * weight.ncols / device.processors;
  int64_t least = INT64_MAX;
  const auto consider = [&](auto boxes) {
    using B = decltype(boxes);
    const int64_t tiles = ceil_div(weight.nrows, B::kRows), rounds = ceil_div(units, B::kParts);
    const DividedK divided = divide_k(tiles, rounds, B::kMostBlocks, device.processors, 3, 37);
    bool worth_it = false;
    if (B::kTokens == 8) {
      worth_it = share >= 400000 && tiles >= 4 * device.processors;
    } else if (B::kTokens == 16) {
      worth_it = (share >= 400000 || B::kParts > 1) && divided.busy >= 60;
    } else {
      worth_it = share >= 200000 || (B::kParts > 1 && divided.busy >= 50);
    }
    const int stages = B::stages(device.shared_per_block - B::kRing, B::kStage);
    if (!worth_it || stages < 2 * B::kParts || divided.takes >= least) return;
    least = divided.takes;
    division = {B::kParts, divided.log2_blocks, int(tiles), stages,
                B::Sums::meetings(units * B::kX, tiles, divided.log2_blocks)};
  };
  for (const int parts : {1, 4}) with_nf4_boxes(nf4_tokens(m), parts, consider);
  return division;
}

// So few that blocks find room beside those of the product before.
constexpr int kStagingThreads = 64;

// The activations of all units: [piece of 8 elements][token]. A lane's byte t of a word has
// elements 2 t and 2 t + 1 of four in a group, as multiply_group takes them: what are neighbours
// there are eight apart here. A thread has a group of a token, and a count to set to zero.
template <int Tokens>
__global__ void nf4_stage(const __grid_constant__ ProductArgs args, int64_t groups, int* counts,
                          int64_t ncounts) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (args.overlap) let_next_kernel_start();
  wait_for_previous_kernel();
  if (!args.overlap) let_next_kernel_start();
  const int64_t i = int64_t{blockIdx.x} * kStagingThreads + threadIdx.x;
  if (i < ncounts) counts[i] = 0;
  if (i >= groups) return;
  const int64_t group = i / Tokens, token = i % Tokens;
  uint4 x[4];
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const int64_t k = group * kGroup + t * 8;
    x[t] = {0, 0, 0, 0};
    if (token < args.m && k < args.ncols) {
      x[t] = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(args.x) +
                                             token * args.x_stride + k);
    }
  }
  auto* const to = static_cast<uint4*>(args.workspace) + i / Tokens * (4 * Tokens) + i % Tokens;
  to[0 * Tokens] = {x[0].x, x[1].x, x[2].x, x[3].x};
  to[1 * Tokens] = {x[0].y, x[1].y, x[2].y, x[3].y};
  to[2 * Tokens] = {x[0].z, x[1].z, x[2].z, x[3].z};
  to[3 * Tokens] = {x[0].w, x[1].w, x[2].w, x[3].w};
#endif
}

// What a lane has of the scales of its row. Absmax: of scales that come in boxes; void: they are
// loaded.
template <class Absmax>
class WarpgroupScales {
 public:
  __device__ __forceinline__ WarpgroupScales(const ProductArgs& args, const Nf4Inputs& inputs,
                                             const float* code)
      : args_(args), inputs_(inputs), code_(code) {}

  // The code of nested ones, by 256 threads or more.
  static __device__ __forceinline__ void prepare(const Nf4Inputs& inputs, float* code) {
    if (std::is_void_v<Absmax> || threadIdx.x >= 256) return;
    code[threadIdx.x] = inputs.scales.nested_code[threadIdx.x];
  }

  // What does not come in boxes, of the unit to come: lane t loads chunk t's.
  __device__ __forceinline__ void load(int row, int unit) {
    loaded_ = {0, 0.0f};
    const int chunk = unit * kUnitChunks + threadIdx.x % 4, chunks = int(args_.ncols / kChunk);
    if (row >= int(args_.nrows) || chunk >= chunks) return;
    const int64_t block = (int64_t{row} * chunks + chunk) >> inputs_.shift;
    if constexpr (std::is_void_v<Absmax>) {
      loaded_ = inputs_.scales.load(block);
    } else {
      loaded_.nested = inputs_.scales.nested_of(block);
    }
  }

  // That unit's; boxed: what came of the row.
  __device__ __forceinline__ void take(const uint8_t* boxed, int unit) {
    float scale;
    if constexpr (std::is_void_v<Absmax>) {
      scale = inputs_.scales.decode(loaded_);
    } else {
      const int chunk = unit * kUnitChunks + threadIdx.x % 4;
      scale = inputs_.scales.decode(code_[boxed[chunk % kScaleBox]], loaded_.nested);
    }
    scale_ = mul(scale, inputs_.code_scale);
  }

  __device__ __forceinline__ float operator()(int chunk) const {
    return __shfl_sync(~0u, scale_, (threadIdx.x & 28) + chunk);
  }

 private:
  const ProductArgs& args_;
  const Nf4Inputs& inputs_;
  const float* code_;
  typename Scales::Loaded loaded_ = {0, 0.0f};
  float scale_ = 0.0f;
};

template <>
class WarpgroupScales<float> {
 public:
  __device__ __forceinline__ WarpgroupScales(const ProductArgs&, const Nf4Inputs& inputs,
                                             const float*)
      : unit_(inputs.code_scale) {}

  static __device__ __forceinline__ void prepare(const Nf4Inputs&, float*) {}
  __device__ __forceinline__ void load(int, int) {}

  __device__ __forceinline__ void take(const uint8_t* boxed, int) {
    const float4 four = *reinterpret_cast<const float4*>(boxed);
    scales_[0] = mul(four.x, unit_);
    scales_[1] = mul(four.y, unit_);
    scales_[2] = mul(four.z, unit_);
    scales_[3] = mul(four.w, unit_);
  }

  __device__ __forceinline__ float operator()(int chunk) const { return scales_[chunk]; }

 private:
  float unit_;
  float scales_[kUnitChunks];
};

// sums, counts: used where several blocks divide K.
template <class X, int Tokens, int Parts, class Absmax>
__global__ void __launch_bounds__(Nf4Boxes<Tokens, Parts>::kThreads, 1)
    nf4_product_sm90(const __grid_constant__ ProductArgs args,
                     const __grid_constant__ Nf4Inputs inputs,
                     const __grid_constant__ CUtensorMap matrix,
                     const __grid_constant__ CUtensorMap boxed_scales, float* sums, int* counts,
                     int log2_blocks, int items, int stages) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  using B = Nf4Boxes<Tokens, Parts>;
  constexpr int kTiles = Tokens / 8, kSums = Tokens / 4;  // of a lane
  constexpr bool kBoxed = !std::is_void_v<Absmax>;
  BCY_DYNAMIC_SHARED(shared);
  auto* const filled = reinterpret_cast<uint64_t*>(shared);
  uint64_t* const emptied = filled + B::kMostStages;
  uint8_t* const ring = shared + B::kRing;
  // The same for all lanes, which the compiler then knows.
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const int lane = threadIdx.x % 32;
  const DividedUnits<Parts> units = {int(unit_count(args.ncols)), log2_blocks, items};

  if (threadIdx.x == B::kConsumers) {
    for (int i = 0; i < stages; ++i) {
      barrier_init(&filled[i], 1);
      barrier_init(&emptied[i], B::kPartWarps);
    }
    barrier_init_fence();
  }
  __syncthreads();

  if (warp >= B::kWarps) {
    leave_registers<B::kFew>();
    if (threadIdx.x != B::kConsumers) return;
    const auto copy_weights = [&](int item, int unit, int stage) {
      uint8_t* const to = ring + stage * B::kStage;
      const int row = units.tile_of(item) * B::kRows;
      expect_bytes(&filled[stage], B::kCodes + B::kX + (kBoxed ? B::kScales : 0));
      copy_box(to, &matrix, unit * kBoxBytes, row, &filled[stage]);
      if constexpr (kBoxed) {
        const int box = unit * kRowScales<Absmax> / kScaleBox;
        copy_box(to + B::kCodes + B::kX, &boxed_scales, box * (kScaleBox / kPlainElement), row,
                 &filled[stage]);
      }
    };
    const auto copy_activations = [&](int unit, int stage) {
      copy_row(ring + stage * B::kStage + B::kCodes,
               static_cast<const uint8_t*>(args.workspace) + int64_t{unit} * B::kX, B::kX,
               &filled[stage]);
    };
    bring_units(units, stages, emptied, copy_weights, copy_activations);
    return;
  }
  take_registers<B::kMany>();

  const int part = warp / B::kPartWarps;
  const int warp_here = warp % B::kPartWarps;  // among those of a part
  const int row_here = warp_here * 8 + lane / 4;  // in a tile
  auto next = units.first(part);
  auto* const code = reinterpret_cast<float*>(shared + B::kCode);
  WarpgroupScales<Absmax> scales(args, inputs, code);
  const auto load_scales = [&] {
    if (units.exists(next)) scales.load(units.tile_of(next.item) * B::kRows + row_here, next.unit);
  };
  load_scales();
  WarpgroupScales<Absmax>::prepare(inputs, code);
  fill_table<B::kConsumers>(shared + B::kTable, inputs.codes, pair_of_halves);
  consumers_sync<B::kConsumers>();

  const Table table(shared + B::kTable);
  const uint32_t ring_at = shared_address(ring);
  const uint32_t codes_at = row_here * kBoxBytes + lane / 4 * 16 + lane % 4 * 4;
  // A chunk's codes as operands: the high and low parts of this warp's rows.
  const auto decode = [&](uint32_t stage_at, int chunk, uint32_t (&operands)[4][4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t word = load_shared_word((stage_at + codes_at) ^ uint32_t(chunk * 32 + i * 16));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint2 entry = table(word, j);
        operands[2 * i + j / 2][j % 2 * 2] = entry.x;
        operands[2 * i + j / 2][j % 2 * 2 + 1] = entry.y;
      }
    }
  };

  // Sum i of a lane is that of token 8 (i / 2) + 2 t + i % 2; it has those from `first` on.
  const auto write = [&](int tile, int first, const float (&values)[B::Sums::kKept]) {
    const int row = tile * B::kRows + row_here;
    if (row >= int(args.nrows)) return;
    const float bias = args.bias == nullptr ? 0.0f : load_element(args.bias, row, args.y_type);
#pragma unroll
    for (int j = 0; j < B::Sums::kKept; ++j) {
      const int i = first + j;
      const int token = i / 2 * 8 + lane % 4 * 2 + i % 2;
      if (token >= args.m) continue;
      store_element(args.y, token * args.y_stride + row, args.y_type,
                    args.bias == nullptr ? values[j] : add(values[j], bias));
    }
  };
  Nf4Sums<X, 1, kTiles, kChunk> unit_sums;
  uint32_t operands[2][4][4];
  PartStage<Parts> stage = {part, 0};
  if (units.exists(next)) {
    barrier_wait(&filled[stage.index], stage.phase);
    decode(ring_at + stage.index * B::kStage, 0, operands[0]);
  }
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    float waiting[units.kLevels][kSums];
    float values[kSums];
    for (int visit = 0; visit < units.visits(); ++visit) {
      unit_sums.clear();
      for (int unit = units.first_unit(item, visit, part); unit < units.units; unit += kPartials) {
        const int this_stage = stage.index;
        const uint32_t stage_at = ring_at + this_stage * B::kStage;
        scales.take(ring + this_stage * B::kStage + B::kCodes + B::kX + row_here * kScaleBox, unit);
        units.advance(next, part);
        load_scales();
#pragma unroll
        for (int chunk = 0; chunk < kUnitChunks; ++chunk) {
          float products[kTiles][4];
          warpgroup_multiply<X, Tokens>(products, operands[chunk % 2],
                                        stage_at + B::kCodes + chunk * kWarpgroupX<Tokens>);
          if (chunk + 1 < kUnitChunks) {
            decode(stage_at, chunk + 1, operands[(chunk + 1) % 2]);
          } else if (units.exists(next)) {
            stage.advance(stages);
            barrier_wait(&filled[stage.index], stage.phase);
            decode(ring_at + stage.index * B::kStage, 0, operands[0]);
          }
          const float scale = scales(chunk);
          warpgroup_wait<Tokens>(products);
          unit_sums.add_chunk(0, chunk, products, scale);
        }
        // All of the stage has been multiplied, which took what every lane has loaded.
        if (lane == 0) barrier_arrive(&emptied[this_stage]);
      }
#pragma unroll
      for (int i = 0; i < kSums; ++i) values[i] = unit_sums.partial[0][i / 2][i % 2];
      join_tree(visit, values, waiting);
    }

    float kept[B::Sums::kKept];
    if (B::Sums::meet(units, item, warp, shared + B::kMeeting, sums, counts, values, kept)) {
      write(units.tile_of(item), part * B::Sums::kKept, kept);
    }
  }
#endif
}

template <class X, int Tokens, int Parts>
int launch_nf4_boxes(const ProductArgs& args, const Nf4Inputs& inputs, const Division& division,
                     const Device& device, cudaStream_t stream) {
  using B = Nf4Boxes<Tokens, Parts>;
  CUtensorMap codes, scales = {};
  if (const int status = describe_boxes(args.weight, row_bytes<Nf4Rows>(args.ncols), args.nrows,
                                        B::kRows, false, codes)) {
    return status;
  }
  auto* kernel = nf4_product_sm90<X, Tokens, Parts, void>;
  const int status = with_absmax(args, inputs, [&](auto absmax) {
    using Absmax = typename decltype(absmax)::type;
    kernel = nf4_product_sm90<X, Tokens, Parts, Absmax>;
    if constexpr (std::is_void_v<Absmax>) {
      return int(BCY_OK);
    } else {
      return describe_scales<Absmax>(args, inputs, B::kRows, scales);
    }
  });
  if (status != BCY_OK) return status;
  if (const int status = allow_shared(kernel, device)) return status;

  float* const sums = division.meetings.sums_in(args.workspace);
  int* const counts = division.meetings.counts_in(args.workspace);
  const int64_t groups = ceil_div(args.ncols, kUnit) * kUnitGroups * Tokens;  // of all tokens
  const int64_t ncounts = division.meetings.ncounts;
  for (int64_t first = 0; first < args.m; first += Tokens) {
    const ProductArgs some = some_tokens(args, first, Tokens);
    if (const int status = launch(
            nf4_stage<Tokens>, dim3(unsigned(ceil_div(std::max(groups, ncounts), kStagingThreads))),
            dim3(kStagingThreads), stream, 0, args.overlap != 0, some, groups, counts, ncounts)) {
      return status;
    }
    if (const int status = launch(
            kernel, dim3(unsigned(std::min(division.items(), device.processors))),
            dim3(B::kThreads), stream, B::kRing + division.stages * B::kStage, true, some, inputs,
            codes, scales, sums, counts, division.log2_blocks, division.items(), division.stages)) {
      return status;
    }
  }
  return BCY_OK;
}

template <class X>
int launch_nf4_sm90(const ProductArgs& args, const Nf4Inputs& inputs, const Division& division,
                    const Device& device, cudaStream_t stream) {
  return with_nf4_boxes(nf4_tokens(args.m), division.parts, [&](auto boxes) {
    using B = decltype(boxes);
    return launch_nf4_boxes<X, B::kTokens, B::kParts>(args, inputs, division, device, stream);
  });
}

}  // namespace bcy
