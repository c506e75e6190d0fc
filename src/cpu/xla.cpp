// SPDX-License-Identifier: Apache-2.0
// What JAX calls on the CPU.
#include "baracuda/xla.h"

namespace bcy::xla {
namespace {

int gguf_matmul(const bcy_gguf_matmul_args* args, int threads) {
  if (const int status = bcy_cpu_gguf_stage(args, threads)) return status;
  return bcy_cpu_gguf_matmul(args, threads);
}

template <class Args, int (*kOperation)(const Args*, int)>
void* run(void* call) {
  const CallFrame& frame = *static_cast<const CallFrame*>(call);
  if (answers_query(frame, 0) || frame.stage != kExecute) return nullptr;
  Problem<Args> problem;
  if (!read(frame, problem)) return fail(frame, kInvalidArgument, kMismatch);
  const int status = kOperation(&problem.args, int(problem.threads));
  if (status == BCY_OK) return nullptr;
  if (status == BCY_ERROR_OUT_OF_MEMORY) {
    return fail(frame, kResourceExhausted, "baracuda_cy: the host has no memory left");
  }
  return fail(frame, kInvalidArgument, kMismatch);
}

}  // namespace
}  // namespace bcy::xla

using namespace bcy::xla;

bcy_xla_handler bcy_cpu_xla_handler(const char* operation) {
  const struct {
    const char* name;
    bcy_xla_handler handler;
  } handlers[] = {
      {"gguf_matmul", run<bcy_gguf_matmul_args, gguf_matmul>},
      {"gguf_matvec", run<bcy_gguf_matmul_args, bcy_cpu_gguf_matvec>},
      {"gguf_dequantize", run<bcy_gguf_dequantize_args, bcy_cpu_gguf_dequantize>},
      {"nf4_matmul", run<bcy_nf4_matmul_args, bcy_cpu_nf4_matmul>},
      {"nf4_dequantize", run<bcy_nf4_dequantize_args, bcy_cpu_nf4_dequantize>},
  };
  for (const auto& it : handlers) {
    if (strcmp(it.name, operation) == 0) return it.handler;
  }
  return nullptr;
}
