// SPDX-License-Identifier: Apache-2.0
#include "../instance.cuh"

template struct bcy::GgufOperations<bcy::Q2_K>;
