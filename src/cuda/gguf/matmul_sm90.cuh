// SPDX-License-Identifier: Apache-2.0
// The product of matmul.cuh for many tokens on Hopper: the same bits.
//
// A thread block takes 64 rows, 16 to a warp, whose units four warpgroups divide among them; or 128
// rows, each half of them by two. They meet at the end. A fifth warpgroup copies. The copy engine
// brings a unit of the rows and of the activations, which staging has put into the order in which
// tensor cores read them; those multiply one group while the warps unpack the next and add up the
// one before.
//
// Where rows are few, several blocks divide K in the same way, and meet in the workspace.
//
// Formats that gain nothing have none: Q6_K, whose halves are multiplied one by one, Q3_K and Q5_0.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/common/parts.cuh"
#include "cuda/common/product.cuh"
#include "cuda/common/warpgroup.cuh"
#include "operands.cuh"
#include "staged.cuh"
#include "unit_words.cuh"

namespace bcy {

// Tokens: 16 or 32. Parts: of K, which warpgroups of a block divide: 2 or 4. What it holds in
// shared memory.
template <class Format, int Tokens, int Parts>
struct GgufBoxes : PartWarps<Parts> {
  using Warps = PartWarps<Parts>;
  using Sums = PartSums<Parts, Tokens / 2>;
  static constexpr int kTokens = Tokens;
  using Record = WarpgroupRecord<Tokens, kStagedSums<Format>>;
  static constexpr int kRows = Warps::kPartWarps * 16;

  // The copy engine begins at multiples of 16 bytes, units at those of kAlignment.
  static constexpr int kAlignment = greatest_power_of_two_in(kUnitBytes<Format>, 16);
  // Rows follow each other an odd number of 16-byte pieces apart: then eight of them are read
  // without bank conflicts.
  static constexpr int kPitch = ((kUnitBytes<Format> + 16 - kAlignment + 15) / 16 | 1) * 16;
  static_assert(kPitch <= kMostPlainBoxBytes);

  // Bytes of a stage of the ring, a unit: codes, activations.
  static constexpr int kCodes = kRows * kPitch;
  static constexpr int kX = Record::kBytes;
  static constexpr int kStage = kCodes + kX;
  static_assert(kStage % 128 == 0);

  // Offsets: barriers, where sums meet, the ring.
  static constexpr int kMeeting = 1024;
  static constexpr int kRing = kMeeting + Sums::kBytes;
  static_assert(2 * Warps::kMostStages * sizeof(uint64_t) <= kMeeting);
};

// Whether the kernel is ever the faster one, and whether it is, as measured. It gains most where a
// group takes many instructions for each of many tokens, or unpacking takes few; what it lacks is
// rows that keep all multiprocessors busy. share: of all weights a multiprocessor's. busy_tiles:
// percent of their time that tiles of 16 rows keep them busy.
template <class Format>
constexpr bool ever_worth_it(bool more_than_16) {
  if (multiplies_halves<Format>) return false;
  if (kStagedSums<Format> == 1 || gives_turns<Format>) return true;
  const int bits = kWholeBits<Format>;
  return more_than_16 && (kStagedSums<Format> > 1 || bits == 4 || bits >= 8);
}
template <class Format>
bool worth_it(bool more_than_16, int64_t share, const DividedK& divided, int64_t busy_tiles) {
  constexpr int64_t kFew = 185000, kSome = 400000, kMany = 1000000;
  constexpr int kBits = kWholeBits<Format>, kSums = kStagedSums<Format>;
  const bool alone = divided.log2_blocks == 0;  // a block has all of K
  if (!more_than_16) return share >= (kSums == 1 && alone ? kSome : kMany);
  if (kBits >= 8) return share >= (alone ? kFew : kSome);
  if (kSums == 8) {
    return share >= kMany || (share >= 100000 && 10 * divided.busy >= 6 * busy_tiles);
  }
  if (kSums == 1) return share >= kFew;
  if (!alone) return share >= kMany;
  if (kSums > 1 || gives_turns<Format>) return share >= kFew && divided.busy >= 70;
  return share >= kSome && divided.busy >= 85;
}

// Into how many parts warpgroups of a block may divide K. Two leave tiles fewer ends, four more
// registers, which eight integer minima need; two stages of bytes for each of four have no room.
template <class Format, int Tokens, int Parts>
constexpr bool kDivides =
    ever_worth_it<Format>(Tokens > 16) && (kWholeBits<Format> >= 8                    ? Parts == 2
                                           : Tokens == 16 || kStagedSums<Format> == 8 ? Parts == 4
                                                                                      : true);

// Calls function(GgufBoxes<...>{}) for as many tokens and parts as a product has at a time, if it
// may have them.
template <class Format, class Function>
int with_gguf_boxes(int64_t m, int parts, Function&& function) {
  int status = BCY_ERROR_INVALID_ARGUMENT;
  const auto try_boxes = [&](auto tokens, auto some) {
    constexpr int kTokens = decltype(tokens)::value, kParts = decltype(some)::value;
    if constexpr (kDivides<Format, kTokens, kParts>) {
      if (kTokens == (m > 16 ? 32 : 16) && kParts == parts) {
        status = function(GgufBoxes<Format, kTokens, kParts>{});
      }
    }
  };
  using std::integral_constant;
  try_boxes(integral_constant<int, 16>{}, integral_constant<int, 4>{});
  try_boxes(integral_constant<int, 32>{}, integral_constant<int, 2>{});
  try_boxes(integral_constant<int, 32>{}, integral_constant<int, 4>{});
  return status;
}

template <class Format>
Division divide_gguf(const ProductArgs& args, const Device& device) {
  Division division;
  if (device.arch < 900 || device.own_arch != 900 || args.m <= 8 || args.nrows == 0 ||
      args.ncols == 0 || args.ncols % kUnit != 0 || args.ncols > kMaxColumns ||
      args.nrows > INT32_MAX / 2 || !rows_on_boundaries<Format>(args) ||
      staged_bytes<Format>(args.ncols, args.m) < 0) {
    return division;
  }
  const int64_t units = args.ncols / kUnit;
  const int64_t share = args.nrows * args.ncols / device.processors;
  const int64_t busy_tiles = divide_k(ceil_div(args.nrows, 16), 1, 1, device.processors, 0, 0).busy;
  int64_t least = INT64_MAX;
  const auto consider = [&](auto boxes) {
    using B = decltype(boxes);
    const int64_t tiles = ceil_div(args.nrows, B::kRows);
    const int64_t rounds = ceil_div(2 * units, B::kParts);  // a half of a unit's time each
    const DividedK divided = divide_k(tiles, rounds, B::kMostBlocks, device.processors, 5, 40);
    const int stages = B::stages(device.shared_per_block - B::kRing, B::kStage);
    // Fewer rows begin earlier.
    const int64_t takes = divided.takes + (B::kParts == 2 ? 20 : 0);
    // A part unpacks its next unit before it leaves this one.
    if (stages < 2 * B::kParts || takes >= least ||
        !worth_it<Format>(args.m > 16, share, divided, busy_tiles)) {
      return int(BCY_OK);
    }
    least = takes;
    division = {B::kParts, divided.log2_blocks, int(tiles), stages,
                B::Sums::meetings(ceil_div(args.m, B::kTokens) * units * B::kX, tiles,
                                  divided.log2_blocks)};
    return int(BCY_OK);
  };
  for (const int parts : {4, 2}) with_gguf_boxes<Format>(args.m, parts, consider);
  return division;
}

// sums, counts: used where several blocks divide K.
template <class Format, int Tokens, int Parts>
__global__ void __launch_bounds__(GgufBoxes<Format, Tokens, Parts>::kThreads, 1)
    gguf_product_sm90(const __grid_constant__ ProductArgs args,
                      const __grid_constant__ CUtensorMap matrix, const uint8_t* records,
                      float* sums, int* counts, int log2_blocks, int items, int stages) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  using B = GgufBoxes<Format, Tokens, Parts>;
  using Record = typename B::Record;
  constexpr int kSums = Record::kSums, kLaneSums = Tokens / 2;
  constexpr int kBlockGroups = Format::kElements / kGroup;
  BCY_DYNAMIC_SHARED(shared);
  auto* const filled = reinterpret_cast<uint64_t*>(shared);
  uint64_t* const emptied = filled + B::kMostStages;
  uint8_t* const ring = shared + B::kRing;
  // The same for all lanes, which the compiler then knows.
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const int lane = threadIdx.x % 32;
  const int nrows = int(args.nrows), tokens = int(args.m);
  const DividedUnits<Parts> units = {int(args.ncols / kUnit), log2_blocks, items};

  if (threadIdx.x == B::kConsumers) {
    for (int i = 0; i < stages; ++i) {
      barrier_init(&filled[i], 1);
      barrier_init(&emptied[i], B::kConsumers / Parts);
    }
    barrier_init_fence();
  }
  __syncthreads();

  if (warp >= B::kWarps) {
    leave_registers<B::kFew>();
    if (threadIdx.x != B::kConsumers) return;
    const auto copy_weights = [&](int item, int unit, int stage) {
      expect_bytes(&filled[stage], B::kStage);
      copy_box(ring + stage * B::kStage, &matrix,
               unit * kUnitBytes<Format> / 16 * (16 / kPlainElement),
               units.tile_of(item) * B::kRows, &filled[stage]);
    };
    const auto copy_activations = [&](int unit, int stage) {
      copy_row(ring + stage * B::kStage + B::kCodes, records + int64_t{unit} * B::kX, B::kX,
               &filled[stage]);
    };
    bring_units(units, stages, emptied, copy_weights, copy_activations);
    return;
  }
  take_registers<B::kMany>();

  const int part = warp / B::kPartWarps;
  const int warp_here = warp % B::kPartWarps;  // among those of a part
  const int row_here = warp_here * 16 + lane / 4;  // in a tile, and 8 on
  const int t = lane % 4;

  // Where row i of the lane is in a stage that holds a unit.
  using Row = Bytes<B::kAlignment>;
  const auto row_in = [&](const uint8_t* stage_at, int unit, int i) {
    const int ahead = B::kAlignment == 16 ? 0 : unit * kUnitBytes<Format> % 16;
    return Row(stage_at + (row_here + 8 * i) * B::kPitch + ahead);
  };

  const Table16 table = operand_table<Format, plain_addends<Format>>();
  uint32_t operands[2][plain_addends<Format>][4];
  const auto unpack = [&](Row upper, Row lower, int group) {
    const int offset = group / kBlockGroups * Format::kBytes;
    load_plain_operands<Format>(upper + offset, lower + offset, group % kBlockGroups, table,
                                operands[group % 2]);
  };

  // Four integer minima, which meet high parts of sums in the first step, low ones in the second.
  const auto unpack_minima = [&](Row upper, Row lower, int step) {
    if constexpr (kSums > 1) {
      auto& a = operands[step % 2][0];
      const int first = step == kUnitGroups ? 0 : 2;
      a[first] = Format::minima(upper, t % (kSums / 4));
      a[first + 1] = Format::minima(lower, t % (kSums / 4));
      a[2 - first] = a[3 - first] = 0;
    }
  };

  // Of two steps, one multiplied while the other joins.
  constexpr int kTiles = Tokens / kTileTokens;
  int dots[2][kTiles][4];
  const auto multiply = [&](uint32_t codes, int step) {
    warpgroup_multiply_codes<Tokens>(dots[step % 2], operands[step % 2],
                                     codes + min(step, kUnitGroups) * (Record::kCodes / 16));
  };

  // What belongs to tokens 2 t and 2 t + 1 of each eight.
  struct Pairs {
    float of[kTiles][2];
    __device__ __forceinline__ explicit Pairs(const uint8_t* from) {
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        const float4 four = *reinterpret_cast<const float4*>(from + n * 8);
        of[n][0] = four.x;
        of[n][1] = four.y;
        of[n + 1][0] = four.z;
        of[n + 1][1] = four.w;
      }
    }
  };

  const auto add_integers = [&](float (&values)[kLaneSums], const int (&integers)[kTiles][4],
                                float upper, float lower, const Pairs& x_scales) {
    const float scales[2] = {upper, lower};
    const float zeros[2] = {zero_or_nan(upper), zero_or_nan(lower)};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& sum = values[4 * n + i];
        // scaled()
        const float value = fma(float(integers[n][i]), scales[i / 2], zeros[i / 2]);
        sum = fma(value, x_scales.of[n][i % 2], sum);
      }
    }
  };

  auto next = units.first(part);
  PartStage<Parts> stage = {part, 0};
  // Two groups of the next unit; if there is none, what is there is unpacked for nothing.
  const auto wait_for_next = [&] {
    if (units.exists(next)) barrier_wait(&filled[stage.index], stage.phase);
  };
  const auto unpack_next = [&](int group) {
    const uint8_t* const stage_at = ring + stage.index * B::kStage;
    unpack(row_in(stage_at, next.unit, 0), row_in(stage_at, next.unit, 1), group);
  };
  wait_for_next();
  unpack_next(0);
  unpack_next(1);
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    float waiting[units.kLevels][kLaneSums];
    float values[kLaneSums];  // [eight tokens][row, 8 on][token 2 t, 2 t + 1]
    for (int visit = 0; visit < units.visits(); ++visit) {
#pragma unroll
      for (int i = 0; i < kLaneSums; ++i) values[i] = 0.0f;
      for (int unit = units.first_unit(item, visit, part); unit < units.units; unit += kPartials) {
        const int this_stage = stage.index;
        const uint8_t* const stage_at = ring + this_stage * B::kStage;
        const uint8_t* const x = stage_at + B::kCodes;
        const uint32_t codes = describe_codes<Tokens>(shared_address(x));
        const Row rows[2] = {row_in(stage_at, unit, 0), row_in(stage_at, unit, 1)};
        stage.advance(stages);
        units.advance(next, part);
        // What scales the groups of a block, in registers.
        [[maybe_unused]] uint32_t words[2][kUnitWords<Format>];
        if constexpr (kBlockGroups == kUnitGroups) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            load_unit_words<Format>(rows[i], words[i]);
          }
        }
        const auto block_of = [&](int i, int group) {
          if constexpr (kBlockGroups == kUnitGroups) {
            return WordBytes{words[i], 0};
          } else {
            return rows[i] + group / kBlockGroups * Format::kBytes;
          }
        };
        multiply(codes, 0);
        // Groups, then the high and the low parts of the integer sums.
        constexpr int kSteps = kUnitGroups + (kSums > 1 ? 2 : 0);
        const uint8_t* const pairs = x + t * Tokens;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const int g = step % kBlockGroups;
          const Pairs x_scales(pairs + (step < kUnitGroups
                                            ? Record::kScalesAt + step * Record::kScales
                                            : Record::kSumsAt));
          auto& done = dots[step % 2];
          if (step + 1 < kSteps) {
            multiply(codes, step + 1);
            warpgroup_wait_codes<1>(done);
          } else {
            warpgroup_wait_codes<0>(done);
          }
          // Two steps ahead.
          if (step + 2 < kUnitGroups) {
            unpack(rows[0], rows[1], step + 2);
          } else if (step + 2 < kSteps) {
            unpack_minima(rows[0], rows[1], step + 2);
          } else {
            if (step + 2 == kSteps) wait_for_next();
            unpack_next(step + 2 - kSteps);
          }
          if (step < kUnitGroups) {
            const auto upper = block_of(0, step), lower = block_of(1, step);
            add_integers(values, done, operand_scale<Format, true>(upper, g),
                         operand_scale<Format, true>(lower, g), x_scales);
            if constexpr (kSums == 1) {
              const float minima[2] = {Format::minimum(upper, g, 0), Format::minimum(lower, g, 0)};
              const Pairs x_sums(pairs + Record::kSumsAt + step * Record::kScales);
#pragma unroll
              for (int n = 0; n < kTiles; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                  float& sum = values[4 * n + i];
                  sum = add_minimum(sum, minima[i / 2], x_sums.of[n][i % 2]);
                }
              }
            }
          } else if (step + 1 == kSteps) {
            if constexpr (kSums > 1) {
#pragma unroll
              for (int n = 0; n < kTiles; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) done[n][i] += dots[0][n][i] << kLowSumBits;
              }
              add_integers(values, done, Format::minimum_scale(block_of(0, 0)),
                           Format::minimum_scale(block_of(1, 0)), x_scales);
            }
          }
        }
        // Every lane for itself: that costs no more than to meet in the warp first.
        barrier_arrive(&emptied[this_stage]);
      }
      join_tree(visit, values, waiting);
    }

    float kept[B::Sums::kKept];
    if (!B::Sums::meet(units, item, warp, shared + B::kMeeting, sums, counts, values, kept)) {
      continue;
    }
    const int tile = units.tile_of(item);
    with_element_type(args.y_type, [&](auto element) {
      using Y = decltype(element);
      const auto* const bias = static_cast<const typename Y::Storage*>(args.bias);
      // Two tokens of a row, then of the one 8 on, or of one of these alone.
#pragma unroll
      for (int j = 0; j < B::Sums::kKept; j += 2) {
        const bool lower = B::Sums::kKept % 4 == 0 ? j / 2 % 2 : part % 2;
        const int row = tile * B::kRows + row_here + 8 * lower;
        const int token = (part * B::Sums::kKept + j) / 4 * 8 + t * 2;
        if (row >= nrows) continue;
        const float added = bias == nullptr ? 0.0f : Y::load(bias + row);
        auto* const y = static_cast<typename Y::Storage*>(args.y) + token * args.y_stride + row;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          if (token + k >= tokens) continue;
          y[k * args.y_stride] = Y::round(bias == nullptr ? kept[j + k] : add(kept[j + k], added));
        }
      }
    });
  }
#endif
}

template <class Format, class B>
int launch_gguf_sm90(const ProductArgs& args, const Division& division, const Device& device,
                     bool early, cudaStream_t stream) {
  CUtensorMap matrix;
  if (const int status = describe_plain_boxes(args.weight, row_bytes<Format>(args.ncols),
                                              args.nrows, B::kPitch, B::kRows, true, matrix)) {
    return status;
  }
  auto* const kernel = gguf_product_sm90<Format, B::kTokens, B::kParts>;
  if (const int status = allow_shared(kernel, device)) return status;
  const auto* const records = static_cast<const uint8_t*>(args.workspace);
  const int64_t pass_bytes = unit_count(args.ncols) * B::kX;
  for (int64_t first = 0; first < args.m; first += B::kTokens) {
    if (const int status = launch(
            kernel, dim3(unsigned(std::min(division.items(), device.processors))),
            dim3(B::kThreads), stream, B::kRing + division.stages * B::kStage, early || first > 0,
            some_tokens(args, first, B::kTokens), matrix, records + first / B::kTokens * pass_bytes,
            division.meetings.sums_in(args.workspace), division.meetings.counts_in(args.workspace),
            division.log2_blocks, division.items(), division.stages)) {
      return status;
    }
  }
  return BCY_OK;
}

}  // namespace bcy
