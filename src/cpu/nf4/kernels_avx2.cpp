// SPDX-License-Identifier: Apache-2.0
#include "cpu/nf4/vectorized.h"
#include "cpu/nf4/vectors_avx2.h"

namespace bcy::cpu::nf4 {

const Kernels* avx2_kernels() { return &Vectorized<Avx2>::kKernels; }

}  // namespace bcy::cpu::nf4
