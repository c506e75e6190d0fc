// SPDX-License-Identifier: Apache-2.0
// bcy_cpu_gguf_quantize: a matrix of floats to packed GGUF blocks.
#include <atomic>

#include "baracuda/api.h"
#include "cpu/pool.h"
#include "cpu/quantize/closed_form.h"
#include "cpu/quantize/search_blocks.h"

namespace bcy::quantize {
namespace {

// Blocks in one piece of work: enough that handing it out costs nothing.
template <class Block>
constexpr int64_t kGrain = 16384 / Block::kElements;

template <class Block, class Element>
int run(const bcy_gguf_quantize_args& args, int threads) {
  if (args.nrows < 0 || args.ncols < 0 || args.ncols % Block::kElements != 0) {
    return BCY_ERROR_INVALID_ARGUMENT;
  }
  const int64_t blocks_per_row = args.ncols / Block::kElements;
  const int64_t blocks = args.nrows * blocks_per_row;
  const auto elements = [&](int64_t block) {
    return static_cast<const typename Element::Storage*>(args.x) +
           block / blocks_per_row * args.x_stride + block % blocks_per_row * Block::kElements;
  };

  // No block can hold NaN or infinity in every format, and a scale made of one would take its
  // neighbours along. A matrix with any is refused whole, before the first byte is written.
  std::atomic<bool> finite{true};
  const auto check = [&](int64_t begin, int64_t end) {
    bool good = true;
    for (int64_t block = begin; block < end; ++block) {
      const auto* from = elements(block);
      for (int i = 0; i < Block::kElements; ++i) good &= is_finite(Element::load(from + i));
    }
    if (!good) finite.store(false, std::memory_order_relaxed);
  };
  if (int status = cpu::parallel_for(blocks, kGrain<Block>, threads, check)) return status;
  if (!finite) return BCY_ERROR_INVALID_ARGUMENT;

  return cpu::parallel_for(blocks, kGrain<Block>, threads, [&](int64_t begin, int64_t end) {
    float x[Block::kElements];
    for (int64_t block = begin; block < end; ++block) {
      const auto* from = elements(block);
      for (int i = 0; i < Block::kElements; ++i) x[i] = Element::load(from + i);
      Block::pack(x, static_cast<uint8_t*>(args.weight) + block * Block::kBytes);
    }
  });
}

template <class Block>
int run(const bcy_gguf_quantize_args& args, int threads) {
  switch (args.x_type) {
    case BCY_F32:
      return run<Block, F32>(args, threads);
    case BCY_F16:
      return run<Block, F16>(args, threads);
    case BCY_BF16:
      return run<Block, BF16>(args, threads);
  }
  return BCY_ERROR_UNSUPPORTED_TYPE;
}

}  // namespace
}  // namespace bcy::quantize

extern "C" int bcy_cpu_gguf_quantize(const bcy_gguf_quantize_args* args, int threads) {
  using namespace bcy::quantize;
  switch (args->format) {
#define BCY_FORMAT(name, file) \
  case bcy::name::kId:         \
    return run<name##Block>(*args, threads);
#include "baracuda/formats.def"
#undef BCY_FORMAT
  }
  return BCY_ERROR_UNKNOWN_FORMAT;
}
