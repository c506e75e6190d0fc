// SPDX-License-Identifier: Apache-2.0
// The operations of one format. Each format's kernels are compiled in a file of their own,
// instances/<format>.cu.
#pragma once

#include <cuda_runtime.h>

#include "baracuda/api.h"
#include "cuda/common/launch.cuh"

namespace bcy {

template <class Format>
struct GgufOperations {
  static int dequantize(const bcy_gguf_dequantize_args& args, cudaStream_t stream);
  static int matvec(const bcy_gguf_matmul_args& args, const Device& device, cudaStream_t stream);
  static int64_t workspace_size(const bcy_gguf_matmul_args& args, const Device& device);
  static int stage(const bcy_gguf_matmul_args& args, const Device& device, cudaStream_t stream);
  static int matmul(const bcy_gguf_matmul_args& args, const Device& device, cudaStream_t stream);
};

// Staging depends on the format only through the records that its product takes and on whether it
// gives codes by turns.
struct Staging {
  bool turns;
  bool early;  // as of a launch
  int* counts = nullptr;  // that it sets to zero, too
  int ncounts = 0;
  // Of the product that follows:
  bool beside = false;  // its blocks leave little shared memory
  bool late = false;  // it starts not before the kernel before the staging is done
  bool spread = false;  // its blocks and these find no room beside each other, or need none
};
template <class Record>
int gguf_stage(const bcy_gguf_matmul_args& args, const Staging& staging, cudaStream_t stream);

}  // namespace bcy
