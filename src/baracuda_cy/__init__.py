# SPDX-License-Identifier: Apache-2.0
"""Low-bit weights for every Python array, on CUDA and on the CPU, with the same bits every time.

>>> import numpy as np
>>> import baracuda_cy as bcy
>>> w = bcy.quantize(np.eye(256, dtype=np.float32), "Q4_K")
>>> bcy.linear(np.ones((8, 256), np.float32), w).shape
(8, 256)
"""

from baracuda_cy.codebooks import NF4_CODEBOOK, nf4_pack_weight, nf4_quantize_value
from baracuda_cy.descriptors import (
    GgufDequantizeDescriptor,
    GgufMmvqDescriptor,
    GgufMmvqMultiMDescriptor,
    Nf4Descriptor,
    Nf4MmvqMultiMDescriptor,
    PlanPreference,
)
from baracuda_cy.errors import (
    BaracudaError,
    CudaError,
    FileFormatError,
    InvalidProblem,
    NotAnArray,
    OutOfMemory,
    ReadOnlyArray,
    Unsupported,
    WorkspaceTooSmall,
)
from baracuda_cy.files.bitsandbytes import (
    BitsandbytesFile,
    open_bitsandbytes,
    save_bitsandbytes,
)
from baracuda_cy.files.gguf import GgufFile, open_gguf
from baracuda_cy.formats import Codebook, ElementKind, GgufBlockFormat, Nf4Layout
from baracuda_cy.gguf import GgufDequantizePlan, GgufMmvqMultiMPlan, GgufMmvqPlan
from baracuda_cy.memory import DeviceArray, DeviceBuffer
from baracuda_cy.nf4 import Nf4DequantizePlan, Nf4MmvqMultiMPlan, Nf4MmvqPlan
from baracuda_cy.ops import concatenate, dequantize, linear, quantize
from baracuda_cy.pinned import PinnedBuffer
from baracuda_cy.sku import (
    ArchSku,
    BackendKind,
    KernelSku,
    MathPrecision,
    OpCategory,
    PrecisionGuarantee,
    QuantizeKind,
)
from baracuda_cy.stream import (
    LEGACY_DEFAULT_STREAM,
    PER_THREAD_DEFAULT_STREAM,
    Event,
    Stream,
)
from baracuda_cy.tensor import GgufTensor, NestedAbsmax, Nf4Tensor
from baracuda_cy.workspace import Workspace

__version__ = "0.1.0"

__all__ = [
    "LEGACY_DEFAULT_STREAM",
    "NF4_CODEBOOK",
    "PER_THREAD_DEFAULT_STREAM",
    "ArchSku",
    "BackendKind",
    "BaracudaError",
    "BitsandbytesFile",
    "Codebook",
    "CudaError",
    "DeviceArray",
    "DeviceBuffer",
    "ElementKind",
    "Event",
    "FileFormatError",
    "GgufBlockFormat",
    "GgufDequantizeDescriptor",
    "GgufDequantizePlan",
    "GgufFile",
    "GgufMmvqDescriptor",
    "GgufMmvqMultiMDescriptor",
    "GgufMmvqMultiMPlan",
    "GgufMmvqPlan",
    "GgufTensor",
    "InvalidProblem",
    "KernelSku",
    "MathPrecision",
    "NestedAbsmax",
    "Nf4DequantizePlan",
    "Nf4Descriptor",
    "Nf4Layout",
    "Nf4MmvqMultiMDescriptor",
    "Nf4MmvqMultiMPlan",
    "Nf4MmvqPlan",
    "Nf4Tensor",
    "NotAnArray",
    "OpCategory",
    "OutOfMemory",
    "PinnedBuffer",
    "PlanPreference",
    "PrecisionGuarantee",
    "QuantizeKind",
    "ReadOnlyArray",
    "Stream",
    "Unsupported",
    "Workspace",
    "WorkspaceTooSmall",
    "__version__",
    "concatenate",
    "dequantize",
    "linear",
    "nf4_pack_weight",
    "nf4_quantize_value",
    "open_bitsandbytes",
    "open_gguf",
    "quantize",
    "save_bitsandbytes",
]
