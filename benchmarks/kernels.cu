// SPDX-License-Identifier: Apache-2.0
// The ceilings that the products are compared with: kernels that only read, only copy, or do
// nothing. CuPy compiles this file; EACH is the number of 16-byte accesses a thread has in flight.

// Launched to overlap, the kernel behind this one in the stream may start from here on.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ unsigned fold(uint4 v) { return v.x ^ v.y ^ v.z ^ v.w; }

// The store keeps the loads alive; random bytes practically never take it.
template <int EACH>
__device__ __forceinline__ void read_body(const uint4* __restrict__ source, long long count,
                                          unsigned* sink) {
  let_next_kernel_start();
  const long long first = (long long)blockIdx.x * blockDim.x * EACH + threadIdx.x;
  uint4 values[EACH];
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const long long at = first + (long long)i * blockDim.x;
    values[i] = at < count ? source[at] : make_uint4(0, 0, 0, 0);
  }
  unsigned sum = 0;
#pragma unroll
  for (int i = 0; i < EACH; ++i) sum ^= fold(values[i]);
  if (sum == 0x9e3779b9u) *sink = sum;
}

extern "C" __global__ void read_1(const uint4* source, long long count, unsigned* sink) {
  read_body<1>(source, count, sink);
}
extern "C" __global__ void read_2(const uint4* source, long long count, unsigned* sink) {
  read_body<2>(source, count, sink);
}
extern "C" __global__ void read_4(const uint4* source, long long count, unsigned* sink) {
  read_body<4>(source, count, sink);
}
extern "C" __global__ void read_8(const uint4* source, long long count, unsigned* sink) {
  read_body<8>(source, count, sink);
}

// Writes `written` vectors and reads `count`, no more than that; a block reads `share` of them.
template <int EACH>
__device__ __forceinline__ void copy_body(const uint4* __restrict__ source, long long count,
                                          long long share, uint4* __restrict__ target,
                                          long long written) {
  const long long from = blockIdx.x * share;
  const long long to = min(from + share, count);
  const long long first = (long long)blockIdx.x * blockDim.x * EACH;
  uint4 values[EACH];
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const long long at = from + (long long)i * blockDim.x + threadIdx.x;
    values[i] = at < to ? source[at] : make_uint4(threadIdx.x, i, 0, 0);
  }
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const long long at = first + (long long)i * blockDim.x + threadIdx.x;
    if (at < written) target[at] = values[i];
  }
}

extern "C" __global__ void copy_1(const uint4* source, long long count, long long share,
                                  uint4* target, long long written) {
  copy_body<1>(source, count, share, target, written);
}
extern "C" __global__ void copy_2(const uint4* source, long long count, long long share,
                                  uint4* target, long long written) {
  copy_body<2>(source, count, share, target, written);
}
extern "C" __global__ void copy_4(const uint4* source, long long count, long long share,
                                  uint4* target, long long written) {
  copy_body<4>(source, count, share, target, written);
}

extern "C" __global__ void empty() { let_next_kernel_start(); }
