// SPDX-License-Identifier: Apache-2.0
// The operations of 4-bit weights. The products with each type of activations are compiled in a
// file of their own, instances/<type>.cu.
#pragma once

#include "cuda/common/launch.cuh"

namespace bcy {

// Rows of whole words, in blocks that end where words do: they can be streamed.
bool streams_rows(const bcy_nf4_matmul_args& args, const Device& device);
bool uses_tensor_cores(const bcy_nf4_matmul_args& args, const Device& device);

template <class X>
int nf4_matmul(const bcy_nf4_matmul_args& args, const Device& device, cudaStream_t stream);

// The sums of units in args.workspace, [token][unit][row], to y.
int nf4_add_units(const ProductArgs& args, cudaStream_t stream);

int nf4_dequantize(const bcy_nf4_dequantize_args& args, cudaStream_t stream);
int nf4_quantize(const bcy_nf4_quantize_args& args, cudaStream_t stream);
int nf4_nest(const bcy_nf4_nest_args& args, cudaStream_t stream);

}  // namespace bcy
