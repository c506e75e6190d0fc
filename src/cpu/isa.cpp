// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa.h"

#include <stdlib.h>
#include <string.h>

#include "baracuda/api.h"

namespace bcy::cpu {
namespace {

Isa choose_isa() {
#ifdef __x86_64__
  const char* const asked = getenv("BARACUDA_CPU_ISA");
  const bool at_most_avx2 = asked && strcmp(asked, "avx2") == 0;
  const bool at_most_baseline = asked && strcmp(asked, "baseline") == 0;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (!avx2 || at_most_baseline) return Isa::Baseline;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  return avx512 && !at_most_avx2 ? Isa::Avx512 : Isa::Avx2;
#else
  return Isa::Baseline;
#endif
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

}  // namespace bcy::cpu

const char* bcy_cpu_isa(void) {
  switch (bcy::cpu::isa()) {
    case bcy::cpu::Isa::Avx512:
      return "avx512_vnni";
    case bcy::cpu::Isa::Avx2:
      return "avx2";
    case bcy::cpu::Isa::Baseline:
      break;
  }
  return "baseline";
}
