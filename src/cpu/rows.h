// SPDX-License-Identifier: Apache-2.0
// How the rows of a matrix are divided over threads.
#pragma once

#include <stdint.h>

#include <algorithm>

#include "cpu/pool.h"

namespace bcy::cpu {

constexpr int kLargestTile = 16;  // weight rows that a kernel takes together, at most

// Calls kernel(begin, end) for all rows, of `bytes` and `multiplications` each.
template <class Kernel>
int for_rows(int64_t nrows, int64_t bytes, int64_t multiplications, int threads, Kernel kernel) {
  // What is worth a hand-over to another thread; and the bytes that stay in a core's own cache
  // while all tokens pass. Rows in whole tiles of every kernel.
  constexpr int64_t kWork = 256 << 10, kCached = 128 << 10;
  const auto rows_of = [](int64_t amount, int64_t per_row) {
    return (amount / std::max(per_row, int64_t{1}) / kLargestTile + 1) * kLargestTile;
  };
  const int64_t block = rows_of(kCached, bytes);
  const int64_t grain = std::min(rows_of(kWork, multiplications), block);
  return parallel_for(nrows, grain, threads, [=](int64_t begin, int64_t end) {
    for (; begin < end; begin += block) kernel(begin, std::min(begin + block, end));
  });
}

}  // namespace bcy::cpu
