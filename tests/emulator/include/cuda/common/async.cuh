// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>

#include "cuda_runtime.h"

namespace bcy {

inline void let_next_kernel_start() {}
using emulator::wait_for_previous_kernel;

#define BCY_DYNAMIC_SHARED(name) uint8_t* const name = emulator::dynamic_shared()

inline void check_boundary(const char* what, uintptr_t value, unsigned boundary) {
  if (value % boundary != 0) emulator::fail("%s is not a multiple of %u bytes", what, boundary);
}

inline uint32_t shared_address(const void* p) { return emulator::shared_address(p); }
inline uint2 load_shared(uint32_t address) {
  uint2 two;
  check_boundary("the address of a load", address, sizeof two);
  memcpy(&two, emulator::shared_pointer(address), sizeof two);
  return two;
}
inline uint32_t load_shared_word(uint32_t address) {
  uint32_t word;
  check_boundary("the address of a load", address, sizeof word);
  memcpy(&word, emulator::shared_pointer(address), sizeof word);
  return word;
}
inline void prefetch_to_l2(const void*) {}

inline void barrier_init(uint64_t* barrier, int arrivals) {
  emulator::barrier_init(shared_address(barrier), arrivals);
}
inline void barrier_init_fence() {}
inline void barrier_arrive(uint64_t* barrier) { emulator::barrier_arrive(shared_address(barrier)); }
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  emulator::barrier_wait(shared_address(barrier), parity);
}

inline void order_stores_of_warp() { __syncwarp(); }

constexpr int kCopyArrivals = __CUDA_ARCH__ >= 900 ? 1 : 32;

inline void copies_issued(uint64_t* barrier) {
  if (__CUDA_ARCH__ < 900) emulator::arrive_after_copies(shared_address(barrier));
}

inline void expect_bytes(uint64_t* barrier, uint32_t bytes) {
  emulator::barrier_arrive(shared_address(barrier), bytes);
}

inline void expect_copies(uint64_t* barrier, uint32_t bytes) {
  if (__CUDA_ARCH__ < 900) return;
  const uint32_t total = __reduce_add_sync(~0u, bytes);
  if (threadIdx.x % 32 == 0) expect_bytes(barrier, total);
  __syncwarp();
}

inline void check_source(const void* from, size_t bytes) {
  if (!emulator::is_allocated(from, bytes)) emulator::fail("a copy from beyond an allocation");
}

inline void copy_row(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  check_boundary("the target of a copy", shared_address(to), 16);
  check_boundary("the source of a copy", reinterpret_cast<uintptr_t>(from), 16);
  check_boundary("the size of a copy", bytes, 16);
  check_source(from, bytes);
  const auto copy = [=] { memcpy(to, from, bytes); };
  if (__CUDA_ARCH__ >= 900) {
    emulator::copy_async(copy, shared_address(barrier), bytes);
  } else {
    emulator::copy_own(copy);
  }
}

// What lies outside the matrix is zeros.
inline void copy_box(void* to, const void* matrix, int column, int row, uint64_t* barrier) {
  const CUtensorMap map = *static_cast<const CUtensorMap*>(matrix);
  check_boundary("the target of a box", shared_address(to), 128);
  const uint32_t width = map.box_columns * map.element_bytes;
  check_source(map.matrix, (map.rows - 1) * map.pitch + map.columns * map.element_bytes);
  const auto copy = [=] {
    auto* const target = static_cast<uint8_t*>(to);
    for (uint32_t r = 0; r < map.box_rows; ++r) {
      for (uint32_t c = 0; c < map.box_columns; ++c) {
        const int64_t x = int64_t{column} + c, y = int64_t{row} + r;
        const bool inside = x >= 0 && y >= 0 && x < int64_t(map.columns) && y < int64_t(map.rows);
        const uint8_t* const from = map.matrix + y * map.pitch + x * map.element_bytes;
        for (uint32_t i = 0; i < map.element_bytes; ++i) {
          uint8_t* byte = target + r * width + c * map.element_bytes + i;
          if (map.swizzled) {  // by the address in shared memory
            const uint32_t at = shared_address(byte);
            byte += int((at & ~0x70u) | ((at ^ at >> 3) & 0x70u)) - int(at);
          }
          *byte = inside ? from[i] : 0;
        }
      }
    }
  };
  emulator::copy_async(copy, shared_address(barrier), width * map.box_rows);
}

template <int Threads>
inline void consumers_sync() {
  emulator::sync_named(1, Threads);
}

template <int Threads>
inline void warps_sync(int barrier) {
  emulator::sync_named(2 + barrier, Threads);
}

}  // namespace bcy
