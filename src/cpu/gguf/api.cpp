// SPDX-License-Identifier: Apache-2.0
// The C interface of the CPU backend's GGUF operations: picks the instruction set, splits the work.
#include "baracuda/api.h"

#include <algorithm>
#include <memory>
#include <new>

#include "cpu/gguf/layout.h"
#include "cpu/isa.h"
#include "cpu/rows.h"

namespace bcy::cpu {
namespace {

const Kernels* kernels_of(int32_t format) {
#ifdef __x86_64__
  return choose(baseline_kernels, avx2_kernels, avx512_kernels)(format);
#else
  return baseline_kernels(format);
#endif
}

int64_t row_bytes(int32_t format, int64_t ncols) {
  return ncols / bcy_gguf_block_elements(format) * bcy_gguf_block_bytes(format);
}

int check_sizes(int32_t format, int64_t nrows, int64_t ncols, int64_t m) {
  const bool valid =
      nrows >= 0 && ncols >= 0 && m >= 0 && ncols % bcy_gguf_block_elements(format) == 0;
  return valid ? BCY_OK : BCY_ERROR_INVALID_ARGUMENT;
}

int check(const bcy_gguf_matmul_args& args) {
  if (!kernels_of(args.format)) return BCY_ERROR_UNKNOWN_FORMAT;
  if (!is_element(args.x_type) || !is_element(args.y_type)) return BCY_ERROR_UNSUPPORTED_TYPE;
  return check_sizes(args.format, args.nrows, args.ncols, args.m);
}

int multiply(const bcy_gguf_matmul_args& args, int threads,
             void (*Kernels::*product)(const bcy_gguf_matmul_args&, int64_t, int64_t)) {
  if (const int status = check(args)) return status;
  if (args.m == 0) return BCY_OK;
  const Kernels* const kernels = kernels_of(args.format);
  return for_rows(args.nrows, row_bytes(args.format, args.ncols), args.ncols * args.m, threads,
                  [&args, kernel = kernels->*product](int64_t begin, int64_t end) {
                    kernel(args, begin, end);
                  });
}

// What `m` tokens take where a product finds them; -1 when it exceeds int64.
template <bool kFine>
int64_t staged_bytes(int32_t format, int64_t ncols, int64_t m) {
  if (ncols < 0 || m < 0) return -1;
  const int64_t span = with_format<int64_t>(
      format, 0, [](auto of) { return Layout<decltype(of), kFine>::kSpanRecords; });
  int64_t bytes;
  if (ncols > INT64_MAX - kSpan || __builtin_mul_overflow(Spans(ncols).spans, span, &bytes) ||
      __builtin_mul_overflow(bytes, m, &bytes) || __builtin_add_overflow(bytes, 255, &bytes)) {
    return -1;
  }
  return bytes & ~int64_t(255);
}

int stage(const bcy_gguf_matmul_args& args, int threads,
          void (*Kernels::*kernel)(const bcy_gguf_matmul_args&, int64_t, int64_t)) {
  const Kernels* const kernels = kernels_of(args.format);
  if (!kernels) return BCY_ERROR_UNKNOWN_FORMAT;
  if (!is_element(args.x_type)) return BCY_ERROR_UNSUPPORTED_TYPE;
  if (const int status = check_sizes(args.format, args.nrows, args.ncols, args.m)) return status;
  constexpr int64_t kElements = 32 << 10;  // worth a hand-over to another thread
  return parallel_for(
      args.m, kElements / (args.ncols + 1) + 1, threads,
      [&args, kernel = kernels->*kernel](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

int element_bytes(int32_t type) { return type == BCY_F32 ? 4 : 2; }

}  // namespace
}  // namespace bcy::cpu

using namespace bcy::cpu;

int64_t bcy_gguf_block_elements(int32_t format) {
  return bcy::with_format<int64_t>(format, 0, [](auto of) { return of.kElements; });
}

int64_t bcy_gguf_block_bytes(int32_t format) {
  return bcy::with_format<int64_t>(format, 0, [](auto of) { return of.kBytes; });
}

int64_t bcy_cpu_gguf_workspace_size(int32_t format, int64_t ncols, int64_t m) {
  return staged_bytes<false>(format, ncols, m);
}

int bcy_cpu_gguf_stage(const bcy_gguf_matmul_args* args, int threads) {
  return stage(*args, threads, &Kernels::stage);
}

int bcy_cpu_gguf_matmul(const bcy_gguf_matmul_args* args, int threads) {
  return multiply(*args, threads, &Kernels::matmul);
}

int bcy_cpu_gguf_matvec(const bcy_gguf_matmul_args* args, int threads) {
  if (const int status = check(*args)) return status;
  if (args->m == 0) return BCY_OK;
  // Some tokens at a time, as many as a core's cache holds: what they take is not the caller's to
  // provide.
  constexpr int64_t kBytes = 1 << 20, kMostTokens = 64, kAlignment = 64;
  const int64_t one = staged_bytes<true>(args->format, args->ncols, 1);
  if (one < 0) return BCY_ERROR_TOO_LARGE;
  const int64_t tokens = std::min({args->m, kMostTokens, std::max(int64_t{1}, kBytes / (one + 1))});
  const std::unique_ptr<uint8_t[]> memory(new (std::nothrow) uint8_t[one * tokens + kAlignment]);
  if (!memory) return BCY_ERROR_OUT_OF_MEMORY;
  bcy_gguf_matmul_args some = *args;
  some.workspace = memory.get() + -reinterpret_cast<uintptr_t>(memory.get()) % kAlignment;
  for (int64_t first = 0; first < args->m; first += tokens) {
    some.m = std::min(args->m - first, tokens);
    some.x =
        static_cast<const uint8_t*>(args->x) + first * args->x_stride * element_bytes(args->x_type);
    some.y = static_cast<uint8_t*>(args->y) + first * args->y_stride * element_bytes(args->y_type);
    if (const int status = stage(some, threads, &Kernels::stage_fine)) return status;
    if (const int status = multiply(some, threads, &Kernels::matvec)) return status;
  }
  return BCY_OK;
}

int bcy_cpu_gguf_dequantize(const bcy_gguf_dequantize_args* args, int threads) {
  const Kernels* const kernels = kernels_of(args->format);
  if (!kernels) return BCY_ERROR_UNKNOWN_FORMAT;
  if (!is_element(args->y_type)) return BCY_ERROR_UNSUPPORTED_TYPE;
  if (const int status = check_sizes(args->format, args->nrows, args->ncols, 1)) return status;
  return for_rows(args->nrows, row_bytes(args->format, args->ncols), args->ncols, threads,
                  [=](int64_t begin, int64_t end) { kernels->dequantize(*args, begin, end); });
}

int bcy_cpu_default_threads(void) { return default_threads(); }
