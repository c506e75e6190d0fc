// SPDX-License-Identifier: Apache-2.0
// The operations of one format. Each format's kernels are compiled in a file of their own,
// instances/<format>.cu.
#pragma once

#include <cuda_runtime.h>

#include "baracuda/api.h"

namespace bcy {

template <class Format>
struct GgufOperations {
  static int dequantize(const bcy_gguf_dequantize_args& args, cudaStream_t stream);
  static int matvec(const bcy_gguf_matmul_args& args, cudaStream_t stream);
  static int stage(const bcy_gguf_matmul_args& args, cudaStream_t stream);
  static int matmul(const bcy_gguf_matmul_args& args, cudaStream_t stream);
};

// Staging depends on the format only through its number of minima per group and on whether it gives
// codes by turns. single: in records of single tokens.
int gguf_stage(const bcy_gguf_matmul_args& args, int minima, bool turns, bool single,
               cudaStream_t stream);

}  // namespace bcy
