// SPDX-License-Identifier: Apache-2.0
#include "../select.cuh"

template int bcy::nf4_matmul<bcy::BF16>(const bcy_nf4_matmul_args&, const Device&, cudaStream_t);
