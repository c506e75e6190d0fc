// SPDX-License-Identifier: Apache-2.0
// The threads of the CPU backend.
#pragma once

#include <stdint.h>

#include <type_traits>

namespace bcy::cpu {

// BARACUDA_THREADS, else the CPUs that the first thread to ask may run on.
int default_threads();

// Calls work(context, begin, end) for pieces of [0, count) on at most `threads` threads (<= 0:
// default_threads()), the caller among them. A piece begins at a multiple of `grain` and has at
// least that many items, but for the last one: large pieces first, so that memory is read in long
// streams, small ones at the end, so that all are done at the same time. What is one piece, or one
// thread's, is one call on the caller.
//
// Everywhere work runs, floats round to nearest and subnormals are kept; what the caller had set is
// back on return. Several threads may call at once; work itself must not.
//
// Returns BCY_OK, or BCY_ERROR_OUT_OF_MEMORY when work threw: a thread that cannot start is not an
// error, the others do its share.
using Work = void (*)(void* context, int64_t begin, int64_t end);
int run_parallel(int64_t count, int64_t grain, int threads, Work work, void* context);

template <class Function>
int parallel_for(int64_t count, int64_t grain, int threads, Function&& function) {
  using Callable = std::remove_reference_t<Function>;
  return run_parallel(
      count, grain, threads,
      [](void* context, int64_t begin, int64_t end) {
        (*static_cast<Callable*>(context))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&function)));
}

}  // namespace bcy::cpu
