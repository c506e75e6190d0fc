// SPDX-License-Identifier: Apache-2.0
// Which of the instruction sets that the kernels are compiled for this process runs.
#pragma once

namespace bcy::cpu {

enum class Isa { Baseline, Avx2, Avx512 };

// The best that the processor has. BARACUDA_CPU_ISA (baseline, avx2 or avx512) can only lower it;
// read once per process.
Isa isa();

// Of what there is once per instruction set, the one for isa().
template <class Kernels>
Kernels choose(Kernels baseline, Kernels avx2, Kernels avx512) {
  switch (isa()) {
    case Isa::Avx512:
      return avx512;
    case Isa::Avx2:
      return avx2;
    case Isa::Baseline:
      break;
  }
  return baseline;
}

}  // namespace bcy::cpu
