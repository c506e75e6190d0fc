// SPDX-License-Identifier: Apache-2.0
#include "cpu/gguf/dequantize.h"
#include "cpu/gguf/products.h"
#include "cpu/gguf/staging.h"
#include "cpu/gguf/vectors_avx512.h"

namespace bcy::cpu {
namespace {

template <class Format>
constexpr Kernels kKernels = {Staging<Avx512, Format>::stage, Product<Avx512, Format>::matmul,
                              Staging<Avx512, Format, true>::stage,
                              Product<Avx512, Format, true>::matmul,
                              Dequantize<Avx512, Format>::dequantize};

}  // namespace

const Kernels* avx512_kernels(int32_t format) {
  return with_format<const Kernels*>(format, nullptr,
                                     [](auto of) { return &kKernels<decltype(of)>; });
}

}  // namespace bcy::cpu
