// SPDX-License-Identifier: Apache-2.0
// The C interface of the CPU backend's GGUF operations: picks the instruction set, splits the work.
#include "baracuda/api.h"

#include <stdlib.h>
#include <string.h>

#include <algorithm>

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

// Rows whose weights take `bytes`, in whole tiles of every kernel.
int64_t rows_of(int64_t bytes, int64_t bytes_per_row) {
  return (bytes / (bytes_per_row > 0 ? bytes_per_row : 1) / kLargestTile + 1) * kLargestTile;
}

// Splits the rows of a matrix over threads. `per_row` measures the work in multiplications.
template <class Kernel>
int for_rows(int32_t format, int64_t nrows, int64_t ncols, int64_t per_row, int threads,
             Kernel kernel) {
  // What is worth a hand-over to another thread; and what stays in a core's own cache while all
  // tokens pass.
  constexpr int64_t kWork = 256 << 10, kCached = 128 << 10;
  const int64_t row_bytes = ncols / bcy_gguf_block_elements(format) * bcy_gguf_block_bytes(format);
  const int64_t grain = std::min(rows_of(kWork, per_row), rows_of(kCached, row_bytes));
  const int64_t block = rows_of(kCached, row_bytes);
  return parallel_for(nrows, grain, threads, [=](int64_t begin, int64_t end) {
    for (; begin < end; begin += block) kernel(begin, std::min(begin + block, end));
  });
}

int check_sizes(int32_t format, int64_t nrows, int64_t ncols, int64_t m) {
  const bool valid =
      nrows >= 0 && ncols >= 0 && m >= 0 && ncols % bcy_gguf_block_elements(format) == 0;
  return valid ? BCY_OK : BCY_ERROR_INVALID_ARGUMENT;
}

int multiply(const bcy_gguf_matmul_args& args, int threads,
             void (*Kernels::*product)(const bcy_gguf_matmul_args&, int64_t, int64_t)) {
  const Kernels* const kernels = isa().kernels(args.format);
  if (!kernels) return BCY_ERROR_UNKNOWN_FORMAT;
  if (!is_element(args.x_type) || !is_element(args.y_type)) return BCY_ERROR_UNSUPPORTED_TYPE;
  if (const int status = check_sizes(args.format, args.nrows, args.ncols, args.m)) return status;
  if (args.m == 0) return BCY_OK;
  return for_rows(args.format, args.nrows, args.ncols, args.ncols * args.m, threads,
                  [&args, kernel = kernels->*product](int64_t begin, int64_t end) {
                    kernel(args, begin, end);
                  });
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
  if (!kernels) return BCY_ERROR_UNKNOWN_FORMAT;
  if (!is_element(args->x_type)) return BCY_ERROR_UNSUPPORTED_TYPE;
  if (const int status = check_sizes(args->format, args->nrows, args->ncols, args->m)) {
    return status;
  }
  constexpr int64_t kElements = 32 << 10;  // worth a hand-over to another thread
  return parallel_for(args->m, kElements / (args->ncols + 1) + 1, threads,
                      [=](int64_t begin, int64_t end) { kernels->stage(*args, begin, end); });
}

int bcy_cpu_gguf_matmul(const bcy_gguf_matmul_args* args, int threads) {
  return multiply(*args, threads, &Kernels::matmul);
}

int bcy_cpu_gguf_matvec(const bcy_gguf_matmul_args* args, int threads) {
  return multiply(*args, threads, &Kernels::matvec);
}

int bcy_cpu_gguf_dequantize(const bcy_gguf_dequantize_args* args, int threads) {
  const Kernels* const kernels = isa().kernels(args->format);
  if (!kernels) return BCY_ERROR_UNKNOWN_FORMAT;
  if (!is_element(args->y_type)) return BCY_ERROR_UNSUPPORTED_TYPE;
  if (const int status = check_sizes(args->format, args->nrows, args->ncols, 1)) return status;
  return for_rows(args->format, args->nrows, args->ncols, args->ncols, threads,
                  [=](int64_t begin, int64_t end) { kernels->dequantize(*args, begin, end); });
}

int bcy_cpu_default_threads(void) { return default_threads(); }

const char* bcy_cpu_isa(void) { return isa().name; }
