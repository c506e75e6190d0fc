// SPDX-License-Identifier: Apache-2.0
// What is known of each device.
#include <cuda_runtime.h>

#include <atomic>

#include "baracuda/runtime.h"
#include "cuda/common/launch.cuh"

namespace bcy {
namespace {

constexpr int kDevices = 64;  // beyond, each call looks anew

int look(int device, Device& found) {
  // A newer device may run code that was compiled for an older one: kernels are chosen by the code.
  cudaFuncAttributes attributes;
  int status = take_error(cudaFuncGetAttributes(&attributes, bcy_cuda_probe_kernel()));
  if (status != BCY_OK) return status;
  found.arch = attributes.ptxVersion * 10;
  found.own_arch = attributes.binaryVersion * 10;
  const struct {
    cudaDeviceAttr attribute;
    int* value;
  } wanted[] = {
      {cudaDevAttrMultiProcessorCount, &found.processors},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &found.shared_per_processor},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, &found.shared_per_block},
      {cudaDevAttrReservedSharedMemoryPerBlock, &found.shared_reserved},
  };
  for (const auto& item : wanted) {
    status = take_error(cudaDeviceGetAttribute(item.value, item.attribute, device));
    if (status != BCY_OK) return status;
  }
  return BCY_OK;
}

}  // namespace

int look_at_device(int device, Device& found) {
  static Device devices[kDevices];
  static std::atomic<int> states[kDevices];  // 0: unknown, 1: being written, 2: known
  if (device < 0 || device >= kDevices) return look(device, found);
  if (states[device].load(std::memory_order_acquire) == 2) {
    found = devices[device];
    return cudaSuccess;
  }
  if (const int status = look(device, found)) return status;
  int unknown = 0;
  if (states[device].compare_exchange_strong(unknown, 1)) {
    devices[device] = found;
    states[device].store(2, std::memory_order_release);
  }
  return cudaSuccess;
}

}  // namespace bcy
