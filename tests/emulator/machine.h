// SPDX-License-Identifier: Apache-2.0
// CUDA's machine on a CPU: what a kernel can ask of the hardware.
//
// Each thread of a block is a fiber. One that waits gives way to another, picked at random, and
// some are left behind for long; a copy may be made at once or as late as can be, and so may what a
// kernel does: so what is missing between a write and a read shows as wrong results, where hardware
// mostly hides it. What the hardware leaves undefined stops the kernel with a message: a collective
// that not all lanes of a warp reach, or reach as different instructions; copies off their
// boundaries or from beyond an allocation; threads that all wait. What is read or written beyond
// memory, or off its boundary, ends the program.
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

// All lanes of the warp, at the same instruction, which its name and its line in the source tell
// from others; returns the operands of the 32.
const Operands* meet_warp(const char* instruction, int line, const Operands& mine = {});

void sync_block();  // __syncthreads
void sync_named(int barrier, int threads);  // bar.sync

// An address of shared memory as 32 bits: an offset.
uint32_t shared_address(const void* p);
uint8_t* shared_pointer(uint32_t address);

// ---- mbarriers --------------------------------------------------------------------------------------------------

void barrier_init(uint32_t barrier, int arrivals);
void barrier_arrive(uint32_t barrier, uint32_t expected_bytes = 0);
void barrier_wait(uint32_t barrier, uint32_t parity);

// ---- copies -----------------------------------------------------------------------------------------------------

// Whether all of it lies in one allocation: copies of whole pieces may go past it inside its page.
bool is_allocated(const void* p, size_t bytes);

// Made now or later, in any order among each other.
void copy_async(std::function<void()> copy, uint32_t barrier, uint32_t bytes);
// Made now or later, the thread's own in order; arrive_after_copies arrives once all so far are.
void copy_own(std::function<void()> copy);
void arrive_after_copies(uint32_t barrier);

// ---- launches ---------------------------------------------------------------------------------------------------

struct Launch {
  Index grid, block;
  size_t shared_bytes;
  bool early;  // may start before the kernel ahead of it in the stream
  const void* stream;
};
// Kernels run when something asks for what they do: the one behind, where it waits for the one
// ahead if it started early; or finish, before the host looks. Both say whether all that ran since
// came to their ends.
bool launch(const Launch& launch, std::function<void()> kernel);
bool finish();
void wait_for_previous_kernel();

}  // namespace emulator
