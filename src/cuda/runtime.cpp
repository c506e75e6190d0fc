// SPDX-License-Identifier: Apache-2.0
// The CUDA runtime behind runtime.h.
#include "baracuda/runtime.h"

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <cstring>

#include "cuda/common/device_guard.h"

namespace {

using bcy::take_error;

constexpr int kMaxDevices = 64;
constexpr int64_t kSmallAllocation = int64_t{32} << 20;

cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }
cudaEvent_t as_event(void* event) { return static_cast<cudaEvent_t>(event); }

// While any thread captures a graph in the default mode, allocating, releasing or querying an event
// would invalidate that capture, although what we ask for has nothing to do with it.
class CaptureAside {
 public:
  CaptureAside() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~CaptureAside() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  CaptureAside(const CaptureAside&) = delete;
  CaptureAside& operator=(const CaptureAside&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

template <typename Call>
int on_device(int device, Call call) {
  const bcy::DeviceGuard guard(device);
  return guard.status() == BCY_OK ? take_error(call()) : guard.status();
}

// 0 unknown, 1 cudaMallocAsync works, 2 it does not.
std::atomic<int> pools_supported[kMaxDevices];

bool has_pools(int device) {
  if (device < 0 || device >= kMaxDevices) return false;
  int known = pools_supported[device].load(std::memory_order_relaxed);
  if (known == 0) {
    int supported = 0;
    if (cudaDeviceGetAttribute(&supported, cudaDevAttrMemoryPoolsSupported, device) != cudaSuccess)
      return false;
    known = supported ? 1 : 2;
    pools_supported[device].store(known, std::memory_order_relaxed);
  }
  return known == 1;
}

std::atomic<cudaMemPool_t> small_pools[kMaxDevices];

// Small allocations (scratch, results) come and go with every call. The device's default pool gives
// its memory back to the system at every synchronization, which makes each of them cost as much as
// cudaMalloc; a pool of our own keeps them without changing that setting for everyone else in the
// process.
cudaMemPool_t small_pool(int device) {
  cudaMemPool_t pool = small_pools[device].load(std::memory_order_acquire);
  if (pool) return pool;
  CaptureAside aside;
  cudaMemPoolProps properties;
  std::memset(&properties, 0, sizeof properties);
  properties.allocType = cudaMemAllocationTypePinned;
  properties.location.type = cudaMemLocationTypeDevice;
  properties.location.id = device;
  if (cudaMemPoolCreate(&pool, &properties) != cudaSuccess) return nullptr;
  uint64_t keep = UINT64_MAX;
  cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep);
  cudaMemPool_t expected = nullptr;
  if (!small_pools[device].compare_exchange_strong(expected, pool)) {
    cudaMemPoolDestroy(pool);
    return expected;
  }
  return pool;
}

cudaError_t allocate(int device, size_t bytes, cudaStream_t stream, void** pointer) {
  if (!has_pools(device)) {
    CaptureAside aside;
    return cudaMalloc(pointer, bytes);
  }
  cudaMemPool_t pool =
      static_cast<int64_t>(bytes) <= kSmallAllocation ? small_pool(device) : nullptr;
  return pool ? cudaMallocFromPoolAsync(pointer, bytes, pool, stream)
              : cudaMallocAsync(pointer, bytes, stream);
}

}  // namespace

extern "C" {

int bcy_cuda_built(void) { return 1; }

const char* bcy_cuda_architectures(void) { return BCY_CUDA_ARCHS; }

int bcy_cuda_toolkit_version(void) { return CUDART_VERSION; }

int bcy_cuda_driver_version(int* version) {
  *version = 0;
  return take_error(cudaDriverGetVersion(version));
}

int bcy_cuda_device_count(int* count) {
  int status = take_error(cudaGetDeviceCount(count));
  if (status != BCY_OK) *count = 0;
  return status;
}

int bcy_cuda_device_info(int device, bcy_device_info* info) {
  cudaDeviceProp properties;
  cudaError_t status = cudaGetDeviceProperties(&properties, device);
  if (status != cudaSuccess) return take_error(status);
  std::memset(info, 0, sizeof *info);
  static_assert(sizeof info->name == sizeof properties.name);
  std::memcpy(info->name, properties.name, sizeof info->name);
  info->major = properties.major;
  info->minor = properties.minor;
  info->multiprocessors = properties.multiProcessorCount;
  return BCY_OK;
}

int bcy_cuda_has_kernels(int device) {
  CaptureAside aside;
  cudaFuncAttributes attributes;
  return on_device(device,
                   [&] { return cudaFuncGetAttributes(&attributes, bcy_cuda_probe_kernel()); });
}

int bcy_cuda_get_device(int* device) { return take_error(cudaGetDevice(device)); }

int bcy_cuda_set_device(int device) { return take_error(cudaSetDevice(device)); }

int bcy_cuda_memory_info(int device, int64_t* free_bytes, int64_t* total_bytes) {
  size_t free_size = 0, total_size = 0;
  int status = on_device(device, [&] { return cudaMemGetInfo(&free_size, &total_size); });
  *free_bytes = static_cast<int64_t>(free_size);
  *total_bytes = static_cast<int64_t>(total_size);
  return status;
}

const char* bcy_cuda_error_name(int code) {
  return cudaGetErrorName(static_cast<cudaError_t>(code));
}

const char* bcy_cuda_error_text(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

int bcy_cuda_stream_create(int device, int priority, void** stream) {
  CaptureAside aside;
  return on_device(device, [&] {
    return cudaStreamCreateWithPriority(reinterpret_cast<cudaStream_t*>(stream),
                                        cudaStreamNonBlocking, priority);
  });
}

int bcy_cuda_stream_destroy(int device, void* stream) {
  CaptureAside aside;
  return on_device(device, [&] { return cudaStreamDestroy(as_stream(stream)); });
}

int bcy_cuda_stream_synchronize(int device, void* stream) {
  return on_device(device, [&] { return cudaStreamSynchronize(as_stream(stream)); });
}

int bcy_cuda_stream_query(int device, void* stream, int* is_done) {
  CaptureAside aside;
  *is_done = 0;
  return on_device(device, [&] {
    cudaError_t status = cudaStreamQuery(as_stream(stream));
    *is_done = status == cudaSuccess;
    return status == cudaErrorNotReady ? cudaGetLastError(), cudaSuccess : status;
  });
}

int bcy_cuda_stream_wait(int device, void* stream, void* event) {
  return on_device(device,
                   [&] { return cudaStreamWaitEvent(as_stream(stream), as_event(event), 0); });
}

int bcy_cuda_stream_is_capturing(int device, void* stream, int* capturing) {
  *capturing = 0;
  return on_device(device, [&] {
    cudaStreamCaptureStatus state = cudaStreamCaptureStatusNone;
    cudaError_t status = cudaStreamIsCapturing(as_stream(stream), &state);
    // The legacy stream cannot say so while a stream that waits for it is capturing; it never
    // captures itself.
    if (status == cudaErrorStreamCaptureImplicit) return cudaGetLastError(), cudaSuccess;
    *capturing = state != cudaStreamCaptureStatusNone;
    return status;
  });
}

int bcy_cuda_stream_device(void* stream, int* device) {
  *device = -1;
  // The question ends a capture.
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  const int status = take_error(cudaStreamIsCapturing(as_stream(stream), &capturing));
  if (status != BCY_OK || capturing != cudaStreamCaptureStatusNone) return status;
  return take_error(cudaStreamGetDevice(as_stream(stream), device));
}

int bcy_cuda_stream_priority(int device, void* stream, int* priority) {
  return on_device(device, [&] { return cudaStreamGetPriority(as_stream(stream), priority); });
}

int bcy_cuda_stream_priority_range(int device, int* least, int* greatest) {
  return on_device(device, [&] { return cudaDeviceGetStreamPriorityRange(least, greatest); });
}

int bcy_cuda_event_create(int device, int timing, void** event) {
  CaptureAside aside;
  return on_device(device, [&] {
    return cudaEventCreateWithFlags(reinterpret_cast<cudaEvent_t*>(event),
                                    timing ? cudaEventDefault : cudaEventDisableTiming);
  });
}

int bcy_cuda_event_destroy(int device, void* event) {
  CaptureAside aside;
  return on_device(device, [&] { return cudaEventDestroy(as_event(event)); });
}

int bcy_cuda_event_record(int device, void* event, void* stream) {
  return on_device(device, [&] { return cudaEventRecord(as_event(event), as_stream(stream)); });
}

int bcy_cuda_event_synchronize(void* event) {
  CaptureAside aside;
  return take_error(cudaEventSynchronize(as_event(event)));
}

int bcy_cuda_event_query(void* event, int* is_done) {
  CaptureAside aside;
  cudaError_t status = cudaEventQuery(as_event(event));
  *is_done = status == cudaSuccess;
  if (status == cudaErrorNotReady) {
    cudaGetLastError();
    return BCY_OK;
  }
  return take_error(status);
}

int bcy_cuda_event_elapsed_ms(void* start, void* end, float* ms) {
  CaptureAside aside;
  return take_error(cudaEventElapsedTime(ms, as_event(start), as_event(end)));
}

int bcy_cuda_malloc(int device, int64_t bytes, void* stream, void** pointer) {
  *pointer = nullptr;
  if (bytes < 0) return BCY_ERROR_INVALID_ARGUMENT;
  if (bytes == 0) return BCY_OK;
  return on_device(device, [&] {
    return allocate(device, static_cast<size_t>(bytes), as_stream(stream), pointer);
  });
}

int bcy_cuda_free(int device, void* pointer, void* stream) {
  if (!pointer) return BCY_OK;
  CaptureAside aside;
  return on_device(device, [&] {
    if (has_pools(device)) return cudaFreeAsync(pointer, as_stream(stream));
    cudaStreamSynchronize(as_stream(stream));
    return cudaFree(pointer);
  });
}

int bcy_cuda_malloc_host(int64_t bytes, void** pointer) {
  *pointer = nullptr;
  if (bytes < 0) return BCY_ERROR_INVALID_ARGUMENT;
  if (bytes == 0) return BCY_OK;
  CaptureAside aside;
  return take_error(cudaHostAlloc(pointer, static_cast<size_t>(bytes), cudaHostAllocPortable));
}

int bcy_cuda_free_host(void* pointer) {
  if (!pointer) return BCY_OK;
  CaptureAside aside;
  return take_error(cudaFreeHost(pointer));
}

int bcy_cuda_memcpy(int device, void* to, const void* from, int64_t bytes, void* stream) {
  if (bytes < 0) return BCY_ERROR_INVALID_ARGUMENT;
  if (bytes == 0) return BCY_OK;
  return on_device(device, [&] {
    return cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault,
                           as_stream(stream));
  });
}

int bcy_cuda_memset(int device, void* to, int value, int64_t bytes, void* stream) {
  if (bytes < 0) return BCY_ERROR_INVALID_ARGUMENT;
  if (bytes == 0) return BCY_OK;
  return on_device(device, [&] {
    return cudaMemsetAsync(to, value, static_cast<size_t>(bytes), as_stream(stream));
  });
}

int bcy_cuda_pointer_device(const void* pointer, int* device_type, int* device) {
  // The numbers are DLPack's: kDLCPU, kDLCUDA, kDLCUDAHost, kDLCUDAManaged.
  CaptureAside aside;
  cudaPointerAttributes attributes;
  cudaError_t status = cudaPointerGetAttributes(&attributes, pointer);
  if (status != cudaSuccess) return take_error(status);
  *device = 0;
  switch (attributes.type) {
    case cudaMemoryTypeDevice:
      *device_type = 2;
      *device = attributes.device;
      break;
    case cudaMemoryTypeManaged:
      *device_type = 13;
      *device = attributes.device;
      break;
    case cudaMemoryTypeHost:
      *device_type = 3;
      *device = attributes.device;
      break;
    default:
      *device_type = 1;
  }
  return BCY_OK;
}

}  // extern "C"
