// SPDX-License-Identifier: Apache-2.0
// What every launcher shares: the checked launch, and the choice of a type from its number.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include <algorithm>

#include "baracuda/api.h"
#include "baracuda/numeric.h"
#include "cuda/common/device_guard.h"

namespace bcy {

constexpr int64_t kMaxGridX = 0x7fffffff;

// What a product works on, of GGUF weights and of 4-bit ones.
using ProductArgs = bcy_gguf_matmul_args;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The same product of `count` tokens, or what is left, from number `first` on.
inline ProductArgs some_tokens(const ProductArgs& args, int64_t first, int64_t count) {
  const auto bytes = [](int32_t type) { return type == BCY_F32 ? 4 : 2; };
  ProductArgs some = args;
  some.m = std::min(args.m - first, count);
  if (args.x != nullptr) {  // is staged
    some.x = static_cast<const uint8_t*>(args.x) + first * args.x_stride * bytes(args.x_type);
  }
  some.y = static_cast<uint8_t*>(args.y) + first * args.y_stride * bytes(args.y_type);
  return some;
}

// Launches and reports this launch's own error. early: the kernel may start before the one ahead of
// it is done (programmatic dependent launch), and waits for it itself. beside: its blocks, which
// take little shared memory, share multiprocessors with those of kernels that take most of it. Left
// to itself, a multiprocessor that is empty when it gets one of the former keeps most of that
// memory as L1 cache until it is empty again.
template <class... Parameters, class... Arguments>
int launch_beside(bool beside, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                  cudaStream_t stream, size_t shared_bytes, bool early, Arguments... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (early) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (beside) {
    attributes[count].id = cudaLaunchAttributePreferredSharedMemoryCarveout;
    attributes[count++].val.sharedMemCarveout = cudaSharedmemCarveoutMaxShared;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return take_error(cudaLaunchKernelEx(&config, kernel, arguments...));
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream,
           size_t shared_bytes, bool early, Arguments... arguments) {
  return launch_beside(false, kernel, grid, block, stream, shared_bytes, early, arguments...);
}

// What the choice of a kernel depends on.
struct Device {
  int arch;                  // that the code this device runs was compiled for: 800, 900, ...
  int own_arch;              // that of its machine code
  int processors;            // multiprocessors
  int shared_per_processor;  // bytes of shared memory
  int shared_per_block;
  int shared_reserved;       // of each block

  // Whether kernels wait for the one ahead themselves: older code would not.
  bool waits() const { return arch >= 900; }
};

// Whether tiles of 32 rows leave half of the multiprocessors without one.
inline bool has_few_rows(const ProductArgs& args, const Device& device) {
  return args.nrows <= 16 * int64_t{device.processors};
}

// Tokens that tiles of 16 rows had best have: 8, 16 or, where those make more tiles than there are
// multiprocessors, 32. Rows so few are in the L2 cache when other tokens ask for them again.
inline int tokens_of_tile(const ProductArgs& args, const Device& device) {
  const int64_t tiles = ceil_div(args.nrows, 16);
  int tokens = 8;
  while (tokens < 32 && tiles * ceil_div(args.m, tokens) > device.processors) tokens *= 2;
  return tokens;
}

// Looks a device up once in the process; it is current.
int look_at_device(int device, Device& found);

// Calls function(Device) while that device is current.
template <class Function>
int on_device(int ordinal, Function&& function) {
  const DeviceGuard guard(ordinal);
  if (guard.status() != BCY_OK) return guard.status();
  Device device;
  if (const int status = look_at_device(ordinal, device)) return status;
  return function(device);
}

// A block may ask for more than 48 KB of shared memory only after its kernel was allowed to. It is
// allowed all there is: threads that launch it with other sizes do not take each other's away.
template <class... Parameters>
int allow_shared(void (*kernel)(Parameters...), const Device& device) {
  return take_error(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         device.shared_per_block));
}

// Calls function(F32{}), function(F16{}) or function(BF16{}).
template <class Function>
int with_element(int element, Function&& function) {
  switch (element) {
    case BCY_F32:
      return function(F32{});
    case BCY_F16:
      return function(F16{});
    case BCY_BF16:
      return function(BF16{});
    default:
      return BCY_ERROR_UNSUPPORTED_TYPE;
  }
}

// The same in a kernel; the branch is the same for every thread.
template <class Function>
__device__ __forceinline__ void with_element_type(int element, Function&& function) {
  if (element == BCY_F32) {
    function(F32{});
  } else if (element == BCY_F16) {
    function(F16{});
  } else {
    function(BF16{});
  }
}

// Loads and stores whose type is known only at run time; the branch is the same for every thread.
__device__ __forceinline__ float load_element(const void* p, int64_t i, int element) {
  switch (element) {
    case BCY_F32:
      return F32::load(static_cast<const float*>(p) + i);
    case BCY_F16:
      return F16::load(static_cast<const uint16_t*>(p) + i);
    default:
      return BF16::load(static_cast<const uint16_t*>(p) + i);
  }
}

__device__ __forceinline__ void store_element(void* p, int64_t i, int element, float x) {
  switch (element) {
    case BCY_F32:
      static_cast<float*>(p)[i] = F32::round(x);
      break;
    case BCY_F16:
      static_cast<uint16_t*>(p)[i] = F16::round(x);
      break;
    default:
      static_cast<uint16_t*>(p)[i] = BF16::round(x);
  }
}

// The last steps of a product: bias, and rounding.
template <class Args>
__device__ __forceinline__ void store_output(const Args& args, int64_t token, int64_t row,
                                             float sum) {
  if (args.bias != nullptr) sum = add(sum, load_element(args.bias, row, args.y_type));
  store_element(args.y, token * args.y_stride + row, args.y_type, sum);
}

}  // namespace bcy
