// SPDX-License-Identifier: Apache-2.0
// Descriptors of matrices for the copy engine. The driver makes them; it is asked at run time, so
// that nothing links to it.
#include <cuda_runtime.h>

#include "cuda/common/launch.cuh"
#include "cuda/common/ring.cuh"

namespace bcy {
namespace {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const int status = take_error(cudaGetDriverEntryPointByVersion(
      "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
  if (status != BCY_OK || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<Encode>(function);
}

int describe(CUtensorMapDataType type, int element_bytes, const void* matrix, int64_t bytes_of_row,
             int64_t nrows, int box_bytes, int box_rows, CUtensorMapSwizzle swizzle,
             CUtensorMapL2promotion promotion, CUtensorMap& map) {
  static const Encode encode = find_encode();
  if (encode == nullptr) return cudaErrorSymbolNotFound;
  const cuuint64_t sizes[] = {cuuint64_t(bytes_of_row / element_bytes), cuuint64_t(nrows)};
  const cuuint64_t strides[] = {cuuint64_t(bytes_of_row)};
  const cuuint32_t box[] = {cuuint32_t(box_bytes / element_bytes), cuuint32_t(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult status =
      encode(&map, type, 2, const_cast<void*>(matrix), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? int(BCY_OK) : int(cudaErrorInvalidValue);
}

CUtensorMapL2promotion promotion(bool neighbours) {
  return neighbours ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B : CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
}

}  // namespace

int describe_boxes(const void* matrix, int64_t bytes_of_row, int64_t nrows, int rows,
                   bool neighbours, CUtensorMap& map) {
  return describe(CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, matrix, bytes_of_row, nrows, kBoxBytes, rows,
                  CU_TENSOR_MAP_SWIZZLE_128B, promotion(neighbours), map);
}

int describe_plain_boxes(const void* matrix, int64_t bytes_of_row, int64_t nrows, int bytes,
                         int rows, bool neighbours, CUtensorMap& map) {
  return describe(CU_TENSOR_MAP_DATA_TYPE_UINT64, kPlainElement, matrix, bytes_of_row, nrows, bytes,
                  rows, CU_TENSOR_MAP_SWIZZLE_NONE, promotion(neighbours), map);
}

}  // namespace bcy
