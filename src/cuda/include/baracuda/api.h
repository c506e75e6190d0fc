// SPDX-License-Identifier: Apache-2.0
// The C interface of the kernels. Both backends take the same arguments: a problem described once
// runs on either.
//
// All pointers of one call live on one device. Sizes and strides are in elements unless they say
// bytes. Functions return a bcy_status or a positive cudaError_t; they neither allocate nor
// synchronize on CUDA.
#pragma once

#include <stdint.h>

#include "baracuda/status.h"

#ifdef __cplusplus
extern "C" {
#endif

// Element types; the numbers are those of baracuda_cy.ElementKind.
enum bcy_element {
  BCY_F32 = 1,
  BCY_F16 = 2,
  BCY_BF16 = 3,
};

// y[m, n] = sum_k dequantize(weight)[n, k] * x[m, k] (+ bias[n])
typedef struct bcy_gguf_matmul_args {
  const void* weight;    // packed blocks, [nrows, ncols / block_size], first byte of the matrix
  const void* x;         // [m, ncols] of x_type, rows x_stride elements apart
  void* y;               // [m, nrows] of y_type, rows y_stride elements apart
  void* workspace;       // staged operations: workspace_size bytes, 256-byte aligned
  const void* bias;      // [nrows] of y_type, or NULL
  int64_t nrows;
  int64_t ncols;
  int64_t m;
  int64_t x_stride;
  int64_t y_stride;
  int32_t format;        // GGUF type id
  int32_t x_type;        // BCY_F32, BCY_F16 or BCY_BF16
  int32_t y_type;        // BCY_F32, BCY_F16 or BCY_BF16
  int32_t device;        // CUDA device ordinal; the CPU backend ignores it
  int32_t overlap;  // CUDA: weights are read before the kernels ahead in the stream are done
} bcy_gguf_matmul_args;

// y[n, k] = dequantize(weight)[n, k]
typedef struct bcy_gguf_dequantize_args {
  const void* weight;
  void* y;  // [nrows, ncols] of y_type, rows y_stride elements apart
  int64_t nrows;
  int64_t ncols;
  int64_t y_stride;
  int32_t format;
  int32_t y_type;  // BCY_F32, BCY_F16 or BCY_BF16
  int32_t device;
} bcy_gguf_dequantize_args;

// weight = quantize(x)
typedef struct bcy_gguf_quantize_args {
  const void* x;  // [nrows, ncols] of x_type, rows x_stride elements apart
  void* weight;  // packed blocks, nrows * ncols / block_size of them
  int64_t nrows;
  int64_t ncols;
  int64_t x_stride;
  int32_t format;
  int32_t x_type;  // BCY_F32, BCY_F16 or BCY_BF16
} bcy_gguf_quantize_args;

// Elements and bytes of one block; 0 for an unknown format.
int64_t bcy_gguf_block_elements(int32_t format);
int64_t bcy_gguf_block_bytes(int32_t format);

// Scratch of the staged product: upper bound in bytes, -1 when it exceeds int64. On CUDA the weight
// may be NULL, which stands for one on a 16-byte boundary; at any other it takes no more.
int bcy_cuda_gguf_workspace_size(const bcy_gguf_matmul_args* args, int64_t* size);
int64_t bcy_cpu_gguf_workspace_size(int32_t format, int64_t ncols, int64_t m);

// Whether bcy_cuda_gguf_matmul stages in the product itself and wants no workspace.
int bcy_cuda_gguf_needs_no_workspace(const bcy_gguf_matmul_args* args, int32_t* answer);

int bcy_cuda_gguf_dequantize(const bcy_gguf_dequantize_args* args, void* stream);
int bcy_cuda_gguf_matvec(const bcy_gguf_matmul_args* args, void* stream);  // float activations
// x -> workspace, for this problem; the weight as in workspace_size.
int bcy_cuda_gguf_stage(const bcy_gguf_matmul_args* args, void* stream);

// x -> y; without a workspace only where none is needed. With x NULL the workspace is staged
// already, for the same problem and weights on 16-byte boundaries where these are. The product
// writes to the workspace, too: one at a time.
int bcy_cuda_gguf_matmul(const bcy_gguf_matmul_args* args, void* stream);

// threads <= 0 takes the size of the pool (bcy_cpu_default_threads).
int bcy_cpu_gguf_dequantize(const bcy_gguf_dequantize_args* args, int threads);
int bcy_cpu_gguf_matvec(const bcy_gguf_matmul_args* args, int threads);
int bcy_cpu_gguf_stage(const bcy_gguf_matmul_args* args, int threads);
int bcy_cpu_gguf_matmul(const bcy_gguf_matmul_args* args, int threads);
int bcy_cpu_gguf_quantize(const bcy_gguf_quantize_args* args, int threads);

// ---- 4-bit codebooks (NF4, FP4) -----------------------------------------------------------------

enum bcy_codebook {
  BCY_NF4 = 0,
  BCY_FP4 = 1,
};

// How two codes share a byte of a [nrows, ncols] matrix.
enum bcy_nf4_layout {
  BCY_BITSANDBYTES = 0,  // the matrix as one row: elements 2 j (high nibble) and 2 j + 1 of byte j
  BCY_ROW_PAIR = 1,  // byte i * ncols + k: row 2 i in the low nibble, row 2 i + 1 in the high one
};

// weight[n, k] = codebook[code(n, k)] * absmax[(n * ncols + k) / block_size]
typedef struct bcy_nf4_weight {
  const void* codes;  // (nrows * ncols + 1) / 2 bytes
  const void* absmax;  // float32; uint8 where nested_absmax is not NULL
  // NULL, or absmax[i] is nested_code[absmax[i]] * nested_absmax[i / nested_block] + nested_offset,
  // each step rounded to float32.
  const float* nested_absmax;
  const float* nested_code;  // 256 values
  int64_t nrows;
  int64_t ncols;
  int32_t block_size;  // elements of the matrix as one row
  int32_t nested_block;  // absmax values
  float nested_offset;
  int32_t codebook;  // bcy_codebook
  int32_t layout;  // bcy_nf4_layout
} bcy_nf4_weight;

// y[m, n] = sum_k weight[n, k] * x[m, k] (+ bias[n])
typedef struct bcy_nf4_matmul_args {
  bcy_nf4_weight weight;
  const void* x;  // [m, ncols] of x_type, rows x_stride elements apart
  void* y;  // [m, nrows] of y_type, rows y_stride elements apart
  const void* bias;  // [nrows] of y_type, or NULL
  void* workspace;  // CUDA: bcy_cuda_nf4_workspace_size bytes, 256-byte aligned; or NULL: the same
                    // bits, slower
  int64_t m;
  int64_t x_stride;
  int64_t y_stride;
  int32_t x_type;  // BCY_F32, BCY_F16 or BCY_BF16
  int32_t y_type;  // x_type or BCY_F32
  int32_t device;  // CUDA device ordinal; the CPU backend ignores it
  int32_t overlap;  // CUDA: weights are read before the kernels ahead in the stream are done
  int32_t exact;  // CUDA: float32 FMA in the order of the CPU backend, no tensor cores
} bcy_nf4_matmul_args;

// y[n, k] = weight[n, k]
typedef struct bcy_nf4_dequantize_args {
  bcy_nf4_weight weight;
  void* y;  // [nrows, ncols] of y_type, rows y_stride elements apart
  int64_t y_stride;
  int32_t y_type;  // BCY_F32, BCY_F16 or BCY_BF16
  int32_t device;
} bcy_nf4_dequantize_args;

// codes, absmax = quantize(x), in the bitsandbytes layout
typedef struct bcy_nf4_quantize_args {
  const void* x;  // count elements of x_type, contiguous
  void* codes;  // (count + 1) / 2 bytes
  float* absmax;  // ceil(count / block_size)
  int64_t count;
  int32_t block_size;
  int32_t codebook;
  int32_t x_type;  // BCY_F32, BCY_F16 or BCY_BF16
  int32_t device;
} bcy_nf4_quantize_args;

// absmax values quantized themselves, 8 bits each
typedef struct bcy_nf4_nest_args {
  const float* absmax;  // count
  void* codes;  // count bytes
  float* nested_absmax;  // ceil(count / nested_block)
  const float* nested_code;  // 256 ascending values
  int64_t count;
  int32_t nested_block;
  float offset;  // taken from every absmax first
  int32_t device;
} bcy_nf4_nest_args;

// Whether bcy_cuda_nf4_matmul multiplies on tensor cores: then its bits are its own, else they are
// the CPU backend's.
int bcy_cuda_nf4_uses_tensor_cores(const bcy_nf4_matmul_args* args, int32_t* answer);
// 0 where a workspace is of no use.
int bcy_cuda_nf4_workspace_size(const bcy_nf4_matmul_args* args, int64_t* size);
int bcy_cuda_nf4_matmul(const bcy_nf4_matmul_args* args, void* stream);
int bcy_cuda_nf4_dequantize(const bcy_nf4_dequantize_args* args, void* stream);
int bcy_cuda_nf4_quantize(const bcy_nf4_quantize_args* args, void* stream);
int bcy_cuda_nf4_nest(const bcy_nf4_nest_args* args, void* stream);

int bcy_cpu_nf4_matmul(const bcy_nf4_matmul_args* args, int threads);
int bcy_cpu_nf4_dequantize(const bcy_nf4_dequantize_args* args, int threads);
int bcy_cpu_nf4_quantize(const bcy_nf4_quantize_args* args, int threads);
int bcy_cpu_nf4_nest(const bcy_nf4_nest_args* args, int threads);

// ---- JAX ----------------------------------------------------------------------------------------

// What XLA calls in place of gguf_matmul, gguf_matvec, gguf_dequantize, nf4_matmul and
// nf4_dequantize (xla.h), from an XLA_FFI_CallFrame* to an XLA_FFI_Error*. NULL for another name,
// and without CUDA. On the CPU gguf_matmul stages, too.
typedef void* (*bcy_xla_handler)(void* call_frame);
bcy_xla_handler bcy_cuda_xla_handler(const char* operation);
bcy_xla_handler bcy_cpu_xla_handler(const char* operation);

// BARACUDA_THREADS, else the CPUs that the first thread to ask may run on.
int bcy_cpu_default_threads(void);
// "avx512_vnni", "avx2" or "baseline": what the products run on here.
const char* bcy_cpu_isa(void);

#ifdef __cplusplus
}
#endif
