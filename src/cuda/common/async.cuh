// SPDX-License-Identifier: Apache-2.0
// Shared memory, and what lets copies and kernels overlap: mbarriers and copies to shared memory
// that complete on them (Ampere and later, bulk copies from Hopper on), and programmatic
// dependent launch (Hopper).
#pragma once

#include <stdint.h>

namespace bcy {

// The next kernel of the stream may start where there is room, if it was launched to.
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until the kernels before this one are done and their writes are seen.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Does nothing but bring the line into the L2 cache.
__device__ __forceinline__ void prefetch_to_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// Declares the shared memory that the launch asked for. In the kernel itself: from a function the
// compiler would take it for any address.
#define BCY_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) uint8_t name[]

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

// By its shared address: a generic one takes an addition more.
__device__ __forceinline__ uint2 load_shared(uint32_t address) {
  uint2 two;
  asm("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(two.x), "=r"(two.y) : "r"(address));
  return two;
}

// The same of a word that is written between loads.
__device__ __forceinline__ uint32_t load_shared_word(uint32_t address) {
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
  return word;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(
                   shared_address(barrier))
               : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#else
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

// A barrier among the first Threads threads of the block.
template <int Threads>
__device__ __forceinline__ void consumers_sync() {
  asm volatile("bar.sync 1, %0;" ::"n"(Threads) : "memory");
}

// One of fourteen others, 0 to 13, of whichever warps have Threads threads together.
template <int Threads>
__device__ __forceinline__ void warps_sync(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(2 + barrier), "n"(Threads) : "memory");
}

// ---- copies of a warp that complete on a barrier ----------------------------------------------------------------
//
// Every lane calls copy_row for its row (or not), then the warp calls copies_issued once with what
// each lane copied. Addresses and sizes are multiples of 16 bytes.

// What lanes of this warp stored to shared memory comes before what they do next: arrivals at
// barriers, and copies over the same bytes.
__device__ __forceinline__ void order_stores_of_warp() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
  __threadfence_block();
  __syncwarp();
}

constexpr int kCopyArrivals =
#if __CUDA_ARCH__ >= 900
    1;
#else
    32;
#endif

#if __CUDA_ARCH__ >= 900

// Arrives and announces bytes that are to come.
__device__ __forceinline__ void expect_bytes(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Announces all bytes before the first copy can complete.
__device__ __forceinline__ void expect_copies(uint64_t* barrier, uint32_t bytes) {
  const uint32_t total = __reduce_add_sync(~0u, bytes);
  if (threadIdx.x % 32 == 0) expect_bytes(barrier, total);
  __syncwarp();
}

__device__ __forceinline__ void copy_row(void* to, const void* from, uint32_t bytes,
                                         uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

__device__ __forceinline__ void copies_issued(uint64_t*) {}

// A box of a matrix that a descriptor describes.
__device__ __forceinline__ void copy_box(void* to, const void* matrix, int byte, int row,
                                         uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], [%4];" ::"r"(shared_address(to)),
      "l"(matrix), "r"(byte), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

#else

__device__ __forceinline__ void expect_copies(uint64_t*, uint32_t) {}

__device__ __forceinline__ void copy_row(void* to, const void* from, uint32_t bytes, uint64_t*) {
  // Neighbouring lanes have neighbouring rows: each goes along its own.
  for (uint32_t i = 0; i < bytes; i += 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to) + i),
                 "l"(static_cast<const uint8_t*>(from) + i)
                 : "memory");
  }
}

__device__ __forceinline__ void copies_issued(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

#endif

#endif

}  // namespace bcy
