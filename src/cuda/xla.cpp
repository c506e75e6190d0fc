// SPDX-License-Identifier: Apache-2.0
// What JAX calls on CUDA.
#include "baracuda/xla.h"

#include "baracuda/runtime.h"

namespace bcy::xla {
namespace {

constexpr int kCuda = 2, kManaged = 13;  // bcy_cuda_pointer_device

template <class Args, int (*kOperation)(const Args*, void*)>
void* run(void* call) {
  const CallFrame& frame = *static_cast<const CallFrame*>(call);
  // The operations only launch kernels, the same for the same problem.
  if (answers_query(frame, kCommandBufferCompatible) || frame.stage != kExecute) return nullptr;
  Problem<Args> problem;
  if (!read(frame, problem)) return fail(frame, kInvalidArgument, kMismatch);
  GetStream get = {sizeof get, nullptr, frame.ctx, nullptr};
  if (Error* const error = frame.api->get_stream(&get)) return error;
  // Where the output is: a stream that is captured does not say where it is. An empty output is
  // nowhere, and asks for nothing.
  int type = 0, device = 0;
  int status = bcy_cuda_pointer_device(problem.args.y, &type, &device);
  if (type == kCuda || type == kManaged) problem.args.device = device;
  if (status == BCY_OK) status = kOperation(&problem.args, get.stream);
  if (status == BCY_OK) return nullptr;
  if (status > 0) return fail(frame, kInternal, bcy_cuda_error_text(status));
  return fail(frame, kInvalidArgument, kMismatch);
}

}  // namespace
}  // namespace bcy::xla

using namespace bcy::xla;

bcy_xla_handler bcy_cuda_xla_handler(const char* operation) {
  const struct {
    const char* name;
    bcy_xla_handler handler;
  } handlers[] = {
      {"gguf_matmul", run<bcy_gguf_matmul_args, bcy_cuda_gguf_matmul>},
      {"gguf_matvec", run<bcy_gguf_matmul_args, bcy_cuda_gguf_matvec>},
      {"gguf_dequantize", run<bcy_gguf_dequantize_args, bcy_cuda_gguf_dequantize>},
      {"nf4_matmul", run<bcy_nf4_matmul_args, bcy_cuda_nf4_matmul>},
      {"nf4_dequantize", run<bcy_nf4_dequantize_args, bcy_cuda_nf4_dequantize>},
  };
  for (const auto& it : handlers) {
    if (strcmp(it.name, operation) == 0) return it.handler;
  }
  return nullptr;
}
