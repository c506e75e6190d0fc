// SPDX-License-Identifier: Apache-2.0
// The ceilings that the products are compared with: kernels that only read, only copy, or do
// nothing. CuPy compiles this file; EACH is the number of 16-byte loads a thread has in flight.

__device__ __forceinline__ unsigned fold(uint4 v) { return v.x ^ v.y ^ v.z ^ v.w; }

// The store keeps the loads alive; random bytes practically never take it.
template <int EACH>
__device__ __forceinline__ void read_body(const uint4* __restrict__ source, long long count,
                                          unsigned* sink) {
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

extern "C" __global__ void copy(const uint4* __restrict__ source, long long count,
                                uint4* __restrict__ target) {
  const long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (at < count) target[at] = source[at];
}

extern "C" __global__ void empty() {}
