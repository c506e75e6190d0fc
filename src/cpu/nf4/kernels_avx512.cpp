// SPDX-License-Identifier: Apache-2.0
#include "cpu/nf4/plain.h"

namespace bcy::cpu::nf4 {

const Kernels* avx512_kernels() { return &Plain::kKernels; }

}  // namespace bcy::cpu::nf4
