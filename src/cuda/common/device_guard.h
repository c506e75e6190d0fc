// SPDX-License-Identifier: Apache-2.0
// What leaves the caller's CUDA state as it was: the current device, and the last error.
#pragma once

#include <cuda_runtime_api.h>

namespace bcy {

// A failed call leaves its code in the runtime's last-error slot, where the next library to look
// would take it for its own.
inline int take_error(cudaError_t status) {
  if (status != cudaSuccess) cudaGetLastError();
  return status;
}

// Makes a device current and puts the caller's back; a negative one stands for whichever is
// current. Asking costs nanoseconds; setting happens only when it differs.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    if (device < 0) return;
    status_ = take_error(cudaGetDevice(&previous_));
    if (status_ != cudaSuccess || previous_ == device) return;
    status_ = take_error(cudaSetDevice(device));
    changed_ = status_ == cudaSuccess;
  }
  ~DeviceGuard() {
    if (changed_) take_error(cudaSetDevice(previous_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  int status() const { return status_; }

 private:
  int previous_ = 0;
  int status_ = cudaSuccess;
  bool changed_ = false;
};

}  // namespace bcy
