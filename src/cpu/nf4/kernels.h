// SPDX-License-Identifier: Apache-2.0
// What the NF4 and FP4 kernels of one instruction set are.
#pragma once

#include <stdint.h>

#include "baracuda/api.h"

namespace bcy::cpu::nf4 {

// Each does [begin, end) of the rows (quantize: blocks) of its operation.
struct Kernels {
  void (*matmul)(const bcy_nf4_matmul_args& args, int64_t begin, int64_t end);
  void (*dequantize)(const bcy_nf4_dequantize_args& args, int64_t begin, int64_t end);
  void (*quantize)(const bcy_nf4_quantize_args& args, int64_t begin, int64_t end);
};

const Kernels* baseline_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

}  // namespace bcy::cpu::nf4
