// SPDX-License-Identifier: Apache-2.0
// The CUDA runtime on a CPU. What was launched is done before a call returns that could tell, so
// that streams are always idle and events always passed. Memory ends where a page does that must
// not be touched, and holds 0xff until it is written.
#include <cuda.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <mutex>

#include "cuda_runtime.h"

struct EmulatedStream {
  int priority;
};
struct EmulatedEvent {
  std::chrono::steady_clock::time_point recorded;
};
struct EmulatedPool {};

namespace {

constexpr int kArch = __CUDA_ARCH__;
constexpr int kProcessors = 8;  // few: a block takes many tiles
// Some of an architecture have less, as many KB as BARACUDA_EMULATOR_SHARED_MEMORY says.
const int kSharedPerProcessor = [] {
  const char* const kilobytes = getenv("BARACUDA_EMULATOR_SHARED_MEMORY");
  return (kilobytes != nullptr ? atoi(kilobytes)
          : kArch >= 900       ? 228
          : kArch >= 800       ? 164
                               : 64)
         << 10;
}();
constexpr int kReserved = kArch >= 800 ? 1 << 10 : 0;
constexpr int kLeast = 0, kGreatest = -5;  // priorities of streams
constexpr size_t kTotalMemory = size_t{8} << 30;
constexpr size_t kBoundary = 256;  // of what cudaMalloc returns
constexpr int kGuard = 0xa5;       // what else there is in its pages

thread_local cudaError_t last_error = cudaSuccess;

cudaError_t done(cudaError_t status) {
  if (status != cudaSuccess) last_error = status;
  return status;
}

// All that was launched; as on a GPU, nothing goes on after a failure.
cudaError_t finish() { return done(emulator::finish() ? cudaSuccess : cudaErrorLaunchFailure); }

// ---- memory -----------------------------------------------------------------------------------------------------

struct Allocation {
  size_t bytes;
  uint8_t* pages;
  size_t mapped;
  cudaMemoryType type;
};
std::mutex mutex;
std::map<uint8_t*, Allocation> allocations;
size_t allocated = 0;

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

cudaError_t allocate(void** pointer, size_t bytes, cudaMemoryType type) {
  *pointer = nullptr;
  if (bytes == 0) return cudaSuccess;
  if (bytes > kTotalMemory) return done(cudaErrorMemoryAllocation);
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  const size_t room = round_up(bytes, kBoundary);
  const size_t mapped = page + round_up(room, page) + page;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allocated + bytes > kTotalMemory) return done(cudaErrorMemoryAllocation);
  void* const memory =
      mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return done(cudaErrorMemoryAllocation);
  auto* const pages = static_cast<uint8_t*>(memory);
  uint8_t* const last = pages + mapped - page;
  mprotect(pages, page, PROT_NONE);
  mprotect(last, page, PROT_NONE);
  uint8_t* const start = last - room;
  memset(pages + page, kGuard, mapped - 2 * page);
  memset(start, 0xff, bytes);
  allocations[start] = {bytes, pages, mapped, type};
  allocated += bytes;
  *pointer = start;
  return cudaSuccess;
}

void expect_untouched(const uint8_t* from, const uint8_t* to, const uint8_t* start) {
  for (; from < to; ++from) {
    if (*from == kGuard) continue;
    fprintf(stderr, "emulated GPU: byte %td of an allocation was written\n", from - start);
    abort();
  }
}

cudaError_t release(void* pointer) {
  if (pointer == nullptr) return cudaSuccess;
  if (const cudaError_t status = finish()) return status;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = allocations.find(static_cast<uint8_t*>(pointer));
  if (found == allocations.end()) return done(cudaErrorInvalidValue);
  const auto& [start, allocation] = *found;
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  expect_untouched(allocation.pages + page, start, start);
  expect_untouched(start + allocation.bytes, allocation.pages + allocation.mapped - page, start);
  munmap(allocation.pages, allocation.mapped);
  allocated -= allocation.bytes;
  allocations.erase(found);
  return cudaSuccess;
}

}  // namespace

bool emulator::is_allocated(const void* p, size_t bytes) {
  const auto* const byte = static_cast<const uint8_t*>(p);
  const std::lock_guard<std::mutex> lock(mutex);
  auto after = allocations.upper_bound(const_cast<uint8_t*>(byte));
  if (after == allocations.begin()) return false;
  const auto& [start, allocation] = *--after;
  return byte + bytes <= start + allocation.bytes;
}

namespace {

// ---- descriptors for the copy engine ----------------------------------------------------------------------------

CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* matrix,
                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const uint32_t element = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : 8;
  const uint32_t width = box[0] * element;
  const bool swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  if (rank != 2 || steps[0] != 1 || steps[1] != 1 ||
      (swizzle != CU_TENSOR_MAP_SWIZZLE_NONE && !swizzled) ||
      reinterpret_cast<uintptr_t>(matrix) % 16 != 0 || strides[0] % 16 != 0 ||
      strides[0] >= uint64_t{1} << 40 || sizes[0] < 1 || sizes[1] < 1 ||
      sizes[0] > uint64_t{1} << 32 || sizes[1] > uint64_t{1} << 32 || box[0] < 1 || box[1] < 1 ||
      box[0] > 256 || box[1] > 256 || width % 16 != 0 || (swizzled && width != 128)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  *map = {static_cast<const uint8_t*>(matrix),
          sizes[0],
          sizes[1],
          strides[0],
          box[0],
          box[1],
          element,
          swizzled};
  return CUDA_SUCCESS;
}

}  // namespace

cudaError_t check_launch(const cudaLaunchConfig_t& config, emulator::Launch& launch) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const bool early = std::any_of(
      config.attrs, config.attrs + config.numAttrs, [](const cudaLaunchAttribute& attribute) {
        return attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization &&
               attribute.val.programmaticStreamSerializationAllowed != 0;
      });
  if (grid.x < 1 || grid.x > 0x7fffffffu || grid.y != 1 || grid.z != 1 || block.x < 1 ||
      block.x > 1024 || block.x % 32 != 0 || block.y != 1 || block.z != 1 ||
      config.dynamicSmemBytes > size_t(kSharedPerProcessor - kReserved)) {
    return done(cudaErrorInvalidConfiguration);
  }
  launch = {{grid.x, 1, 1}, {block.x, 1, 1}, config.dynamicSmemBytes, early, config.stream};
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t status = last_error;
  last_error = cudaSuccess;
  return status;
}

const char* cudaGetErrorName(cudaError_t status) {
  switch (status) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorInvalidResourceHandle:
      return "cudaErrorInvalidResourceHandle";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    default:
      return "unrecognized error code";
  }
}
const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaErrorMemoryAllocation ? "out of memory" : cudaGetErrorName(status);
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  return done(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device != 0) return done(cudaErrorInvalidDevice);
  *properties = {"Emulated GPU", kArch / 100, kArch % 100 / 10, kProcessors, 1,
                 int(50) << 20,  kTotalMemory};
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return done(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = kProcessors;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = kSharedPerProcessor;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = kSharedPerProcessor - kReserved;
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = kReserved;
      break;
    case cudaDevAttrMemoryPoolsSupported:
      *value = 1;
      break;
  }
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = attributes->binaryVersion = kArch / 10;
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  *free_bytes = kTotalMemory - allocated;
  *total_bytes = kTotalMemory;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned,
                                             cudaDriverEntryPointQueryResult* found) {
  if (strcmp(name, "cuTensorMapEncodeTiled") != 0) return done(cudaErrorSymbolNotFound);
  *function = reinterpret_cast<void*>(&encode);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int priority) {
  *stream = new EmulatedStream{min(max(priority, kGreatest), kLeast)};
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const cudaError_t status = finish();
  delete stream;
  return status;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return finish(); }
cudaError_t cudaStreamQuery(cudaStream_t) { return finish(); }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetDevice(cudaStream_t, int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  const bool made = reinterpret_cast<uintptr_t>(stream) > 2;  // 0, 1 and 2 are the default streams
  *priority = made ? stream->priority : 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = kLeast;
  *greatest = kGreatest;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new EmulatedEvent{};
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  event->recorded = std::chrono::steady_clock::now();
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return finish(); }
cudaError_t cudaEventQuery(cudaEvent_t) { return finish(); }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
  const std::chrono::steady_clock::time_point never;
  if (start->recorded == never || end->recorded == never) {
    return done(cudaErrorInvalidResourceHandle);
  }
  *ms = std::chrono::duration<float, std::milli>(end->recorded - start->recorded).count();
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  return allocate(pointer, bytes, cudaMemoryTypeDevice);
}
cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t) {
  return allocate(pointer, bytes, cudaMemoryTypeDevice);
}
cudaError_t cudaMallocFromPoolAsync(void** pointer, size_t bytes, cudaMemPool_t, cudaStream_t) {
  return allocate(pointer, bytes, cudaMemoryTypeDevice);
}
cudaError_t cudaFree(void* pointer) { return release(pointer); }
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return release(pointer); }
cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  return allocate(pointer, bytes, cudaMemoryTypeHost);
}
cudaError_t cudaFreeHost(void* pointer) { return release(pointer); }
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  if (const cudaError_t status = finish()) return status;
  memmove(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  if (const cudaError_t status = finish()) return status;
  memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  *attributes = {cudaMemoryTypeUnregistered, 0};
  const std::lock_guard<std::mutex> lock(mutex);
  auto* const byte = static_cast<uint8_t*>(const_cast<void*>(pointer));
  auto after = allocations.upper_bound(byte);
  if (after == allocations.begin()) return cudaSuccess;
  const auto& [start, allocation] = *--after;
  if (byte < start + allocation.bytes) attributes->type = allocation.type;
  return cudaSuccess;
}

cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) {
  *pool = new EmulatedPool;
  return cudaSuccess;
}
cudaError_t cudaMemPoolDestroy(cudaMemPool_t pool) {
  delete pool;
  return cudaSuccess;
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
