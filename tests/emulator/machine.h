// SPDX-License-Identifier: Apache-2.0
// CUDA's machine on a CPU: what a kernel can ask of the hardware.
//
// Each thread of a block is a fiber. One that waits gives way to another, picked at random, and a
// copy may be made at once or as late as can be: so what is missing between a write and a read
// shows as wrong results, where hardware mostly hides it. What the hardware leaves undefined stops
// the launch with a message: a collective that not all lanes of a warp reach, or reach as different
// instructions; copies off their boundaries; threads that all wait.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>

namespace emulator {

struct Index {
  unsigned x, y, z;
};

// What the running thread sees of itself. Fibers of a block share an operating-system thread.
struct Thread {
  Index thread, block, grid_dim;
};
extern thread_local const Thread* this_thread;

// The shared memory that the launch asked for.
uint8_t* dynamic_shared();

// Stops the launch, which returns an error.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- threads that meet ------------------------------------------------------------------------------------------

// What lanes bring to a collective instruction and see of each other.
struct Operands {
  uint32_t words[6];
};

// All lanes of the warp, at the same instruction; returns the operands of the 32.
const Operands* meet_warp(const char* instruction, const Operands& mine = {});

void sync_block();  // __syncthreads
void sync_named(int barrier, int threads);  // bar.sync
void sync_cluster();
unsigned cluster_rank();

// An address of shared memory as 32 bits: the block's rank in its cluster, and an offset.
uint32_t shared_address(const void* p);
uint8_t* shared_pointer(uint32_t address);
uint32_t shared_address_in(uint32_t address, unsigned rank);

// ---- mbarriers --------------------------------------------------------------------------------------------------

void barrier_init(uint32_t barrier, int arrivals);
void barrier_arrive(uint32_t barrier, uint32_t expected_bytes = 0);
void barrier_wait(uint32_t barrier, uint32_t parity);

// ---- copies -----------------------------------------------------------------------------------------------------

// Made now or later, in any order among each other.
void copy_async(std::function<void()> copy, uint32_t barrier, uint32_t bytes);
// Made now or later, the thread's own in order; arrive_after_copies arrives once all so far are.
void copy_own(std::function<void()> copy);
void arrive_after_copies(uint32_t barrier);
void store_remote(uint32_t address, uint32_t value, uint32_t barrier);

// ---- launches ---------------------------------------------------------------------------------------------------

struct Launch {
  Index grid, block;
  unsigned cluster;
  size_t shared_bytes;
};
// Whether the kernel ran to its end.
bool run(const Launch& launch, const std::function<void()>& kernel);

}  // namespace emulator
