// SPDX-License-Identifier: Apache-2.0
// The products of 4-bit weights with one type of activations: which kernel takes a problem.
#pragma once

#include "baracuda/float_environment.h"
#include "exact_sm90.cuh"
#include "matmul_sm90.cuh"
#include "operations.h"

namespace bcy {

inline ProductArgs as_rows(const bcy_nf4_matmul_args& args) {
  ProductArgs rows = {};
  rows.weight = args.weight.codes;
  rows.x = args.x;
  rows.y = args.y;
  rows.bias = args.bias;
  rows.workspace = args.workspace;
  rows.nrows = args.weight.nrows;
  rows.ncols = args.weight.ncols;
  rows.m = args.m;
  rows.x_stride = args.x_stride;
  rows.y_stride = args.y_stride;
  rows.x_type = args.x_type;
  rows.y_type = args.y_type;
  rows.device = args.device;
  rows.overlap = args.overlap;
  return rows;
}

template <class X>
int nf4_matmul(const bcy_nf4_matmul_args& args, const Device& device, cudaStream_t stream) {
  const FloatEnvironment environment;  // codes are split here
  const Codebook& codebook = *codebook_of(args.weight.codebook);
  const Scales scales(args.weight);
  if (!streams_rows(args, device)) {
    const int64_t passes = ceil_div(args.m, kAnyTokens);
    const int64_t blocks = ceil_div(args.weight.nrows, kAnyRows) * passes;
    if (blocks > kMaxGridX || args.weight.ncols > kMaxColumns) return BCY_ERROR_TOO_LARGE;
    return launch(nf4_product_any<X>, dim3(unsigned(blocks)), dim3(kConsumers), stream, 0, false,
                  args, Nf4Inputs{scales, 0, float_words(codebook)}, Blocks(args.weight),
                  unsigned(passes));
  }
  const ProductArgs rows = as_rows(args);
  const bool boundaries = rows_on_boundaries<Nf4Rows>(rows);
  const auto inputs_of = [&](int chunk, const CodeWords& codes, float factor) {
    return Nf4Inputs{scales, log2_of(args.weight.block_size / chunk), codes, 1.0f / factor};
  };
  const auto streamed = [&](auto* tile, const Nf4Inputs& inputs) {
    using Tile = std::remove_pointer_t<decltype(tile)>;
    const bool overlap = args.overlap != 0;
    return launch_streamed<Tile, typename Tile::Ring>(rows, inputs, device, Tile::kMemory, overlap,
                                                      overlap, stream);
  };
  if (!uses_tensor_cores(args, device)) {
    const bool one_scale = args.weight.block_size >= kChunk;
    const Nf4Inputs inputs = inputs_of(one_scale ? kChunk : kGroup, float_words(codebook), 1.0f);
    if (boundaries && args.workspace != nullptr && has_nf4_tables(args.weight, device)) {
      return launch_nf4_tables<X>(rows, inputs, device, stream);
    }
    constexpr int kMany = sizeof(typename X::Storage) == 4 ? 2 : 4;
    if (!one_scale) {
      return streamed(static_cast<Nf4ExactTile<X, kMany, false, false>*>(nullptr), inputs);
    }
    if (!boundaries || !loads_at_once(rows, 4)) {
      return streamed(static_cast<Nf4ExactTile<X, kMany, true, false>*>(nullptr), inputs);
    }
    if (args.m > 1) {
      return streamed(static_cast<Nf4ExactTile<X, kMany, true, true>*>(nullptr), inputs);
    }
    return streamed(static_cast<Nf4ExactTile<X, 1, true, true>*>(nullptr), inputs);
  }
  if constexpr (!std::is_same_v<X, F32>) {
    const float factor = stretch<X>(args.weight.codebook);
    const int chunk = args.weight.block_size < kChunk ? kGroup : kChunk;
    const Nf4Inputs inputs = inputs_of(chunk, split_words<X>(codebook, factor), factor);
    if (chunk == kGroup) {
      return streamed(static_cast<Nf4AnyTile<X, kGroup>*>(nullptr), inputs);
    }
    if (!boundaries || !loads_at_once(rows, 8)) {
      return streamed(static_cast<Nf4AnyTile<X, kChunk>*>(nullptr), inputs);
    }
    const Division division = divide_nf4(args.weight, args.m, device);
    if (args.workspace != nullptr && division.parts > 0) {
      return launch_nf4_sm90<X>(rows, inputs, division, device, stream);
    }
    return with_absmax(rows, inputs, [&](auto absmax) {
      using Absmax = typename decltype(absmax)::type;
      const auto regular = [&](auto* tile) { return streamed(tile, inputs); };
      if (args.m == 1) return regular(static_cast<Nf4RegularTile<X, 1, 16, Absmax>*>(nullptr));
      const int tokens = tokens_of_tile(rows, device);
      if (args.m <= 8 || tokens == 8) {
        return regular(static_cast<Nf4RegularTile<X, 8, 16, Absmax>*>(nullptr));
      }
      if (args.m > 16 && tokens > 16) {
        return regular(static_cast<Nf4RegularTile<X, 32, 16, Absmax>*>(nullptr));
      }
      // Twice the rows share what is read of 16 tokens. For others there are no registers, or no
      // room for two thread blocks.
      using Wide = Nf4RegularTile<X, 16, 32, Absmax>;
      constexpr typename Wide::Ring* kRing = nullptr;
      if (!has_few_rows(rows, device) && holds<Wide>(kRing, 2, Wide::kMemory, device)) {
        return regular(static_cast<Wide*>(nullptr));
      }
      return regular(static_cast<Nf4RegularTile<X, 16, 16, Absmax>*>(nullptr));
    });
  }
  return BCY_ERROR_UNSUPPORTED_TYPE;
}

}  // namespace bcy
