// SPDX-License-Identifier: Apache-2.0
// What every native function returns: 0, a positive cudaError_t, or one of these.
#pragma once

enum bcy_status {
  BCY_OK = 0,
  BCY_ERROR_NO_CUDA = -1,            // this build has no CUDA kernels
  BCY_ERROR_UNKNOWN_FORMAT = -2,     // the format id is not in formats.def
  BCY_ERROR_UNSUPPORTED_TYPE = -3,   // the element type is not one this operation takes
  BCY_ERROR_TOO_LARGE = -4,          // a size exceeds what one launch can address
  BCY_ERROR_OUT_OF_MEMORY = -5,      // the host could not provide memory
  BCY_ERROR_INVALID_ARGUMENT = -6,   // a size, stride or pointer contradicts the operation
};
