// SPDX-License-Identifier: Apache-2.0
// The products of staged activations: which kernel takes a problem. The bits are the same whichever
// does.
#pragma once

#include <algorithm>
#include <type_traits>

#include "lanes.cuh"
#include "matmul.cuh"
#include "matmul_sm90.cuh"
#include "operations.h"
#include "staged.cuh"

namespace bcy {

// Many tokens leave no registers to load activations ahead, nor, with what minima and scales of
// halves take, for two tiles of rows.
template <class Format>
constexpr bool takes_many_registers =
    !std::is_same_v<Format, Q2_K> && (Format::kMinima > 0 || Format::kScaleElements == 16);

// One tile of 16 rows of which two thread blocks share a multiprocessor, or wider ones.
template <class Format, int Tokens>
using NarrowTile = StagedTile<Format, Tokens, 1, 2>;
template <class Format, int Tokens, int RowTiles>
using WideTile =
    StagedTile<Format, Tokens, RowTiles, 1,
               Tokens <= 8 || (Tokens == 16 && !(takes_many_registers<Format> && RowTiles == 2))>;

// Q2_K takes so few registers that two thread blocks share a multiprocessor with more rows or
// tokens, too, if activations are not loaded ahead.
template <int Tokens, int RowTiles>
using SharingTile = StagedTile<Q2_K, Tokens, RowTiles, 2, false>;

// A product by tiles (product.cuh), in lanes or on tensor cores.
template <class Format>
class TiledProduct {
 public:
  // fused: activations are staged inside. early: the kernel may start before the one ahead is done;
  // alone: no kernel that it waits for is part of the same call.
  TiledProduct(const ProductArgs& args, const Device& device, bool fused, bool early, bool alone,
               cudaStream_t stream)
      : args_(args),
        device_(device),
        staged_(staged_of(args, gives_turns<Format>, fused)),
        early_(early),
        alone_(alone),
        on_boundaries_(rows_on_boundaries<Format>(args)),
        few_rows_(has_few_rows(args, device)),
        stream_(stream) {}

  int launch() const {
    if (device_.arch < 800) {
      return args_.m == 1 ? direct<NarrowTile<Format, 1>>() : direct<NarrowTile<Format, 8>>();
    }
    if (takes_lanes<Format>(args_, device_)) return in_lanes();
    // Eight tokens at a time take longer where they are unpacked for again.
    const int tokens = std::max(tokens_of_tile(args_, device_), kWholeBits<Format> < 5 ? 8 : 16);
    if (args_.m > 16 && tokens > 16) return many_tokens();
    if (args_.m > 8 && tokens > 8) return some_tokens();
    return few_tokens();
  }

 private:
  using Boxes = BoxRing<Format, 32>;
  static constexpr bool kIsQ2 = std::is_same_v<Format, Q2_K>;

  template <class Tile>
  int direct() const {
    return launch_direct(static_cast<Tile*>(nullptr), args_, staged_, stream_);
  }

  // extra: bytes of activations in shared memory.
  template <class Tile, class Ring>
  int run(int64_t extra) const {
    return launch_streamed<Tile, Ring>(args_, staged_, device_, int(extra), early_, alone_,
                                       stream_);
  }
  template <class Tile>
  int by_rows(int64_t extra) const {
    return on_boundaries_ ? run<Tile, RowRing<Format, Tile::kRows, true>>(extra)
                          : run<Tile, RowRing<Format, Tile::kRows, false>>(extra);
  }
  template <class Tile>
  int by_rows() const {
    return by_rows<Tile>(fused_bytes());
  }

  // Whether there is room for two stages of a ring.
  template <class Tile, class Ring>
  bool has_room(int64_t extra) const {
    return holds<Tile>(static_cast<Ring*>(nullptr), 2, extra, device_);
  }
  template <class Tile>
  bool fits(int64_t extra = 0) const {
    return on_boundaries_ ? has_room<Tile, RowRing<Format, Tile::kRows, true>>(extra)
                          : has_room<Tile, RowRing<Format, Tile::kRows, false>>(extra);
  }

  // Whether tiles of 32 rows are a few more than the multiprocessors, up to `most` times as many:
  // then some take one more than the others, and of tiles of 16 rows they all take as many or one
  // more, of half the size.
  bool uneven(int most) const {
    const int64_t tiles = ceil_div(args_.nrows, 2 * kTileRows), processors = device_.processors;
    const int64_t left = tiles % processors;
    return left > 0 && 4 * left <= processors && tiles > processors && tiles / processors <= most;
  }

  // Boxes copy fastest; with rows and narrow tiles more fits a multiprocessor side by side, which
  // five bits, at up to eight tokens, gain from longer.
  template <class Tile>
  bool boxed() const {
    const int fewest = args_.m <= 8 && kWholeBits<Format> == 5 ? 12 : 3;
    return args_.nrows >= fewest * 32 * int64_t{device_.processors} &&
           has_boxes<Format>(args_, device_) &&
           shares_processor<Tile>(static_cast<Boxes*>(nullptr), device_);
  }

  int64_t fused_bytes() const {
    return staged_.fused ? staged_bytes<Format>(args_.ncols, args_.m) : 0;
  }

  int in_lanes() const {
    if constexpr (constexpr int kMost = kLaneTokens<Format>; kMost > 0) {
      return with_lane_tokens<kMost>(args_.m, [&](auto tokens) {
        using Tile = LaneTile<Format, decltype(tokens)::value>;
        return with_lane_ring<Format>(args_, [&](auto* ring) {
          using Ring = std::remove_pointer_t<decltype(ring)>;
          return run<Tile, Ring>(Tile::activation_bytes(args_.ncols));
        });
      });
    }
    return BCY_ERROR_INVALID_ARGUMENT;
  }

  int few_tokens() const {
    if (args_.m == 1) return by_rows<NarrowTile<Format, 1>>();
    // Six bits come by rows and narrow tiles however many there are.
    if constexpr (kWholeBits<Format> != 6) {
      using Wide = std::conditional_t<kIsQ2, SharingTile<8, 2>, WideTile<Format, 8, 2>>;
      if (boxed<Wide>()) return run<Wide, Boxes>(fused_bytes());
    }
    return by_rows<NarrowTile<Format, 8>>();
  }

  int some_tokens() const {
    using Wide = WideTile<Format, 16, 2>;
    // Narrow ones read the activations twice as often, which shows least where codes take long to
    // arrive.
    const bool narrow = few_rows_ || uneven(kWholeBits<Format> >= 5 ? 2 : 1) || !fits<Wide>();
    if (narrow) return by_rows<WideTile<Format, 16, 1>>();
    // Twice the warps make up for activations that are read twice as often, but for short tiles,
    // one for each multiprocessor.
    if constexpr (kIsQ2) {
      const bool single = args_.nrows <= Wide::kRows * int64_t{device_.processors};
      if (!single || args_.ncols > 4096) return by_rows<SharingTile<16, 1>>();
    }
    // Codes that take long to unpack leave few registers for the places in boxes.
    if constexpr (Format::kScaleElements == 32 && !gives_turns<Format>) {
      if (boxed<Wide>()) return run<Wide, Boxes>(fused_bytes());
    }
    return by_rows<Wide>();
  }

  int many_tokens() const {
    constexpr bool kLarge = takes_many_registers<Format>;
    // One tile of rows for 32 tokens: their activations are more than the L1 cache holds, and more
    // than the weights.
    if constexpr (kLarge) {
      using Tile = StagedTile<Format, 32, 1, 1, false, true>;
      const int64_t extra = Tile::staying_bytes(args_);
      const int64_t passes = ceil_div(args_.m, Tile::kTokens);
      // Few tiles do not make up for the copy, nor for the processors that are left over where each
      // pass has as many.
      const int64_t left_over = device_.processors % passes;
      const bool stay = device_.arch >= 900 && extra >= 0 && 8 * left_over <= device_.processors &&
                        ceil_div(args_.nrows, Tile::kRows) * passes >= 3 * device_.processors;
      if (stay && fits<Tile>(extra)) return by_rows<Tile>(extra);
    }
    // With float minima a few registers spill, which costs less.
    if constexpr (!kLarge || kStagedSums<Format> == 1) {
      using Wide = WideTile<Format, 32, 2>;
      const bool narrow = few_rows_ || (uneven(1) && !kLarge) || !fits<Wide>();
      if (!narrow) return by_rows<Wide>();
    }
    return by_rows<WideTile<Format, 32, 1>>();
  }

  const ProductArgs& args_;
  const Device& device_;
  Staged staged_;
  bool early_, alone_;
  bool on_boundaries_;
  bool few_rows_;
  cudaStream_t stream_;
};

// Enough for all kernels, whichever a weight's address lets run.
template <class Format>
int64_t GgufOperations<Format>::workspace_size(const ProductArgs& args, const Device& device) {
  const int64_t staged = staged_bytes<Format>(args.ncols, args.m);
  return staged < 0 ? staged : std::max(staged, divide_gguf<Format>(args, device).meetings.bytes);
}

template <class Format>
int GgufOperations<Format>::stage(const ProductArgs& args, const Device& device,
                                  cudaStream_t stream) {
  constexpr int kSums = kStagedSums<Format>;
  Staging staging = {gives_turns<Format>, args.overlap != 0 && device.waits()};
  staging.spread = args.m > kTileTokens;
  if (const Division division = divide_gguf<Format>(args, device); division.parts > 0) {
    return with_gguf_boxes<Format>(args.m, division.parts, [&](auto boxes) {
      using Record = typename decltype(boxes)::Record;
      staging.counts = division.meetings.counts_in(args.workspace);
      staging.ncounts = int(division.meetings.ncounts);
      return gguf_stage<Record>(args, staging, stream);
    });
  }
  if (takes_lanes<Format>(args, device)) {
    Geometry geometry;
    if (const int status = lane_geometry<Format>(args, device, geometry)) return status;
    staging.beside = geometry.beside;
    staging.late = geometry.ahead < geometry.stages;
  } else if (args.m > 1) {
    staging.spread |= has_few_rows(args, device);
    return gguf_stage<StagedRecord<kTileTokens, kSums>>(args, staging, stream);
  }
  return gguf_stage<StagedRecord<1, kSums>>(args, staging, stream);
}

template <class Format>
int GgufOperations<Format>::matmul(const ProductArgs& args, const Device& device,
                                   cudaStream_t stream) {
  const bool fused = args.workspace == nullptr && args.ncols > 0;
  const bool unstaged = !fused && args.x != nullptr && args.ncols > 0;
  if (fused && !stages_inside<Format>(args, device)) return BCY_ERROR_INVALID_ARGUMENT;
  if (unstaged) {
    if (const int status = stage(args, device, stream)) return status;
  }
  // After this call's own staging the product may start early: only activations come from there.
  const bool early = args.overlap != 0 || unstaged;
  if (const Division division = divide_gguf<Format>(args, device); division.parts > 0) {
    return with_gguf_boxes<Format>(args.m, division.parts, [&](auto boxes) {
      return launch_gguf_sm90<Format, decltype(boxes)>(args, division, device, early, stream);
    });
  }
  const bool alone = args.overlap != 0 && !unstaged;
  return TiledProduct<Format>(args, device, fused, early, alone, stream).launch();
}

}  // namespace bcy
