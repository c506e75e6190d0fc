// SPDX-License-Identifier: Apache-2.0
#include "cpu/nf4/vectorized.h"
#include "cpu/nf4/vectors_avx512.h"

namespace bcy::cpu::nf4 {

const Kernels* avx512_kernels() { return &Vectorized<Avx512>::kKernels; }

}  // namespace bcy::cpu::nf4
