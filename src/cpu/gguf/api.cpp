// SPDX-License-Identifier: Apache-2.0
// The C interface of the CPU backend's GGUF operations: picks the instruction set, splits the work.
#include "baracuda/api.h"

#include <stdlib.h>
#include <string.h>

#include "cpu/gguf/layout.h"
#include "cpu/pool.h"

namespace bcy::cpu {
namespace {

struct Isa {
  const char* name;
  const Kernels* (*kernels)(int32_t format);
};

constexpr Isa kBaseline = {"baseline", baseline_kernels};
#ifdef __x86_64__
constexpr Isa kAvx2 = {"avx2", avx2_kernels};
constexpr Isa kAvx512 = {"avx512_vnni", avx512_kernels};
#endif

// The best that the processor has. BARACUDA_CPU_ISA (baseline, avx2 or avx512) can only lower it.
Isa choose_isa() {
#ifdef __x86_64__
  const char* const asked = getenv("BARACUDA_CPU_ISA");
  const bool at_most_avx2 = asked && strcmp(asked, "avx2") == 0;
  const bool at_most_baseline = asked && strcmp(asked, "baseline") == 0;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (!avx2 || at_most_baseline) return kBaseline;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  return avx512 && !at_most_avx2 ? kAvx512 : kAvx2;
#else
  return kBaseline;
#endif
}

const Isa& isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

bool is_element(int32_t type) { return type == BCY_F32 || type == BCY_F16 || type == BCY_BF16; }

// Rows of a piece of work: enough to be worth a hand-over, and whole tiles of every kernel.
int64_t row_grain(int64_t bytes_per_row, int64_t products_per_row) {
  constexpr int64_t kBytes = 64 << 10, kProducts = 256 << 10;
  const int64_t by_bytes = kBytes / (bytes_per_row > 0 ? bytes_per_row : 1);
  const int64_t by_products = kProducts / (products_per_row > 0 ? products_per_row : 1);
  const int64_t rows = by_bytes < by_products ? by_bytes : by_products;
  return (rows / kLargestTile + 1) * kLargestTile;
}

int64_t matrix_row_bytes(int32_t format, int64_t ncols) {
  return ncols / bcy_gguf_block_elements(format) * bcy_gguf_block_bytes(format);
}

int check_matmul(const bcy_gguf_matmul_args& args, const Kernels* kernels) {
  if (!kernels) return BCY_ERROR_UNKNOWN_FORMAT;
  if (!is_element(args.x_type) || !is_element(args.y_type)) return BCY_ERROR_UNSUPPORTED_TYPE;
  if (args.nrows < 0 || args.ncols < 0 || args.m < 0 ||
      args.ncols % bcy_gguf_block_elements(args.format) != 0) {
    return BCY_ERROR_INVALID_ARGUMENT;
  }
  return BCY_OK;
}

}  // namespace
}  // namespace bcy::cpu

using namespace bcy::cpu;

int64_t bcy_gguf_block_elements(int32_t format) {
  switch (format) {
#define BCY_FORMAT(name, file) \
  case bcy::name::kId:         \
    return bcy::name::kElements;
#include "baracuda/formats.def"
#undef BCY_FORMAT
  }
  return 0;
}

int64_t bcy_gguf_block_bytes(int32_t format) {
  switch (format) {
#define BCY_FORMAT(name, file) \
  case bcy::name::kId:         \
    return bcy::name::kBytes;
#include "baracuda/formats.def"
#undef BCY_FORMAT
  }
  return 0;
}

int64_t bcy_cpu_gguf_workspace_size(int32_t format, int64_t ncols, int64_t m) {
  if (ncols < 0 || m < 0) return -1;
  int64_t record = 0;
  switch (format) {
#define BCY_FORMAT(name, file)           \
  case bcy::name::kId:                   \
    record = Layout<bcy::name>::kRecord; \
    break;
#include "baracuda/formats.def"
#undef BCY_FORMAT
  }
  int64_t bytes;
  if (ncols > INT64_MAX - kSpan ||
      __builtin_mul_overflow(Spans(ncols).spans * bcy::kUnitGroups, record, &bytes) ||
      __builtin_mul_overflow(bytes, m, &bytes) || __builtin_add_overflow(bytes, 255, &bytes)) {
    return -1;
  }
  return bytes & ~int64_t(255);
}

int bcy_cpu_gguf_stage(const bcy_gguf_matmul_args* args, int threads) {
  const Kernels* const kernels = isa().kernels(args->format);
  if (const int status = check_matmul(*args, kernels)) return status;
  const int64_t grain = (32 << 10) / (args->ncols + 1) + 1;
  return parallel_for(args->m, grain, threads,
                      [=](int64_t begin, int64_t end) { kernels->stage(*args, begin, end); });
}

int bcy_cpu_gguf_matmul(const bcy_gguf_matmul_args* args, int threads) {
  const Kernels* const kernels = isa().kernels(args->format);
  if (const int status = check_matmul(*args, kernels)) return status;
  if (args->m == 0) return BCY_OK;
  const int64_t grain =
      row_grain(matrix_row_bytes(args->format, args->ncols), args->ncols * args->m);
  return parallel_for(args->nrows, grain, threads,
                      [=](int64_t begin, int64_t end) { kernels->matmul(*args, begin, end); });
}

int bcy_cpu_gguf_matvec(const bcy_gguf_matmul_args* args, int threads) {
  const Kernels* const kernels = isa().kernels(args->format);
  if (const int status = check_matmul(*args, kernels)) return status;
  if (args->m == 0) return BCY_OK;
  const int64_t grain =
      row_grain(matrix_row_bytes(args->format, args->ncols), args->ncols * args->m);
  return parallel_for(args->nrows, grain, threads,
                      [=](int64_t begin, int64_t end) { kernels->matvec(*args, begin, end); });
}

int bcy_cpu_gguf_dequantize(const bcy_gguf_dequantize_args* args, int threads) {
  const Kernels* const kernels = isa().kernels(args->format);
  if (!kernels) return BCY_ERROR_UNKNOWN_FORMAT;
  if (!is_element(args->y_type)) return BCY_ERROR_UNSUPPORTED_TYPE;
  if (args->nrows < 0 || args->ncols < 0 ||
      args->ncols % bcy_gguf_block_elements(args->format) != 0) {
    return BCY_ERROR_INVALID_ARGUMENT;
  }
  const int64_t grain = row_grain(matrix_row_bytes(args->format, args->ncols), args->ncols);
  return parallel_for(args->nrows, grain, threads,
                      [=](int64_t begin, int64_t end) { kernels->dequantize(*args, begin, end); });
}

int bcy_cpu_default_threads(void) { return default_threads(); }

const char* bcy_cpu_isa(void) { return isa().name; }
