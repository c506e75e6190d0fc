// SPDX-License-Identifier: Apache-2.0
// Everything that instances/<format>.cu instantiates.
#pragma once

#include "dequantize.cuh"
#include "matvec.cuh"
#include "select.cuh"
