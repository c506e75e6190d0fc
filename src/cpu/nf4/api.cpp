// SPDX-License-Identifier: Apache-2.0
// The C interface of the CPU backend's NF4 and FP4 operations: checks, splits the work.
#include "baracuda/api.h"

#include <string.h>

#include <algorithm>
#include <cmath>

#include "baracuda/block_codes.h"
#include "baracuda/float_environment.h"
#include "baracuda/nf4_weight.h"
#include "cpu/elements.h"
#include "cpu/isa.h"
#include "cpu/nf4/kernels.h"
#include "cpu/rows.h"

namespace bcy::cpu::nf4 {
namespace {

const Kernels& kernels() {
#ifdef __x86_64__
  return *choose(baseline_kernels, avx2_kernels, avx512_kernels)();
#else
  return *baseline_kernels();
#endif
}

int64_t blocks_of(int64_t count, int64_t size) { return count / size + (count % size != 0); }

void nest_block(const bcy_nf4_nest_args& args, const float* middles, int64_t block) {
  const int64_t first = block * args.nested_block;
  const int count = int(std::min<int64_t>(args.nested_block, args.count - first));
  const float* const absmax = args.absmax + first;
  auto* const codes = static_cast<uint8_t*>(args.codes) + first;
  float largest = 0.0f;
  for (int i = 0; i < count; ++i) {
    const float magnitude = std::fabs(add(absmax[i], -args.offset));
    largest = magnitude > largest ? magnitude : largest;
  }
  args.nested_absmax[block] = largest;
  if (largest == 0.0f) {
    memset(codes, 0, count);
    return;
  }
  const float inverse = div(1.0f, largest);
  for (int i = 0; i < count; ++i) {
    codes[i] = nested_code_of(middles, mul(add(absmax[i], -args.offset), inverse));
  }
}

}  // namespace
}  // namespace bcy::cpu::nf4

using namespace bcy::cpu;
using namespace bcy::cpu::nf4;

int bcy_cpu_nf4_matmul(const bcy_nf4_matmul_args* args, int threads) {
  if (const int status = bcy::check_weight(args->weight)) return status;
  if (!is_element(args->x_type) || (args->y_type != args->x_type && args->y_type != BCY_F32)) {
    return BCY_ERROR_UNSUPPORTED_TYPE;
  }
  if (args->m < 0) return BCY_ERROR_INVALID_ARGUMENT;
  if (args->m == 0) return BCY_OK;
  return for_rows(args->weight.nrows, args->weight.ncols / 2, args->weight.ncols * args->m, threads,
                  [=](int64_t begin, int64_t end) { kernels().matmul(*args, begin, end); });
}

int bcy_cpu_nf4_dequantize(const bcy_nf4_dequantize_args* args, int threads) {
  if (const int status = bcy::check_weight(args->weight)) return status;
  if (!is_element(args->y_type)) return BCY_ERROR_UNSUPPORTED_TYPE;
  return for_rows(args->weight.nrows, args->weight.ncols / 2, args->weight.ncols, threads,
                  [=](int64_t begin, int64_t end) { kernels().dequantize(*args, begin, end); });
}

int bcy_cpu_nf4_quantize(const bcy_nf4_quantize_args* args, int threads) {
  if (!bcy::codebook_of(args->codebook)) return BCY_ERROR_UNKNOWN_FORMAT;
  if (!is_element(args->x_type)) return BCY_ERROR_UNSUPPORTED_TYPE;
  // Odd blocks would share bytes.
  if (args->count < 0 || args->block_size <= 0 || args->block_size % 2 != 0) {
    return BCY_ERROR_INVALID_ARGUMENT;
  }
  constexpr int64_t kElements = 16 << 10;  // worth a hand-over to another thread
  return parallel_for(blocks_of(args->count, args->block_size), kElements / args->block_size + 1,
                      threads,
                      [=](int64_t begin, int64_t end) { kernels().quantize(*args, begin, end); });
}

int bcy_cpu_nf4_nest(const bcy_nf4_nest_args* args, int threads) {
  if (args->count < 0 || args->nested_block <= 0) return BCY_ERROR_INVALID_ARGUMENT;
  const bcy::FloatEnvironment environment;
  float middles[255];
  for (int i = 0; i < 255; ++i) {
    middles[i] = bcy::mul(bcy::add(args->nested_code[i], args->nested_code[i + 1]), 0.5f);
  }
  constexpr int64_t kElements = 4 << 10;
  return parallel_for(blocks_of(args->count, args->nested_block),
                      kElements / args->nested_block + 1, threads,
                      [=, &middles](int64_t begin, int64_t end) {
                        for (; begin < end; ++begin) nest_block(*args, middles, begin);
                      });
}
