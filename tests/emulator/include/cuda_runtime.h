// SPDX-License-Identifier: Apache-2.0
// CUDA C++ as a C++ compiler takes it: the words of the language, what threads know of themselves,
// intrinsics, launches.
#pragma once

#include <cmath>
#include <cstdlib>
#include <tuple>
#include <type_traits>

#include "cuda_runtime_api.h"
#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
// Threads of a block are fibers of one thread.
#define __shared__ static thread_local

// What the running thread knows of itself.
template <emulator::Index emulator::Thread::* Which>
struct EmulatedIndex {
  struct {
    operator unsigned() const { return (emulator::this_thread->*Which).x; }
  } x;
};
inline constexpr EmulatedIndex<&emulator::Thread::thread> threadIdx{};
inline constexpr EmulatedIndex<&emulator::Thread::block> blockIdx{};
inline constexpr EmulatedIndex<&emulator::Thread::grid_dim> gridDim{};

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

// ---- intrinsics -------------------------------------------------------------------------------------------------

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }

inline int __float2int_rn(float x) { return x != x ? 0 : int(std::nearbyint(x)); }

inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t select) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= uint32_t(bytes >> 8 * (select >> 4 * i & 7) & 0xff) << 8 * i;
  }
  return result;
}
inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 4; ++i) sum += int8_t(a >> 8 * i) * int8_t(b >> 8 * i);
  return sum;
}

inline int atomicAdd(int* p, int value) { return __atomic_fetch_add(p, value, __ATOMIC_RELAXED); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline float __ldcg(const float* p) { return *p; }

inline void __syncthreads() { emulator::sync_block(); }
inline void __syncwarp(int line = __builtin_LINE()) { emulator::meet_warp("__syncwarp", line); }

template <class T>
T __shfl_sync(unsigned, T value, int lane, int line = __builtin_LINE()) {
  static_assert(sizeof(T) == sizeof(uint32_t));
  emulator::Operands mine = {};
  memcpy(&mine.words[0], &value, sizeof value);
  memcpy(&value, &emulator::meet_warp("__shfl_sync", line, mine)[lane & 31].words[0], sizeof value);
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int line = __builtin_LINE()) {
  return __shfl_sync(mask, value, int(threadIdx.x % 32) ^ lanes, line);
}
inline unsigned __reduce_add_sync(unsigned, unsigned value, int line = __builtin_LINE()) {
  const emulator::Operands* const all = emulator::meet_warp("__reduce_add_sync", line, {{value}});
  unsigned sum = 0;
  for (int lane = 0; lane < 32; ++lane) sum += all[lane].words[0];
  return sum;
}
inline unsigned __reduce_max_sync(unsigned, unsigned value, int line = __builtin_LINE()) {
  const emulator::Operands* const all = emulator::meet_warp("__reduce_max_sync", line, {{value}});
  unsigned largest = 0;
  for (int lane = 0; lane < 32; ++lane) largest = std::max(largest, all[lane].words[0]);
  return largest;
}

// ---- launches ---------------------------------------------------------------------------------------------------

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*)(Parameters...), cudaFuncAttribute, int) {
  return cudaSuccess;
}

// What the launch asks for, checked as the driver does.
cudaError_t check_launch(const cudaLaunchConfig_t& config, emulator::Launch& launch);

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  emulator::Launch launch;
  if (const cudaError_t status = check_launch(*config, launch)) return status;
  std::tuple<Parameters...> values(arguments...);
  const bool well = emulator::launch(
      launch, [kernel, values = std::move(values)] { std::apply(kernel, values); });
  return well ? cudaSuccess : cudaErrorLaunchFailure;
}
