# SPDX-License-Identifier: Apache-2.0
# Sums and products of sizes, in *r; True where one overflows, and *r has wrapped around.
from libc.stdint cimport int64_t


cdef extern from *:
    """
    static inline int bcy_product_overflows(int64_t a, int64_t b, int64_t* r) {
      return __builtin_mul_overflow(a, b, r);
    }
    static inline int bcy_sum_overflows(int64_t a, int64_t b, int64_t* r) {
      return __builtin_add_overflow(a, b, r);
    }
    """
    bint product_overflows "bcy_product_overflows"(int64_t a, int64_t b, int64_t* r) noexcept nogil
    bint sum_overflows "bcy_sum_overflows"(int64_t a, int64_t b, int64_t* r) noexcept nogil
