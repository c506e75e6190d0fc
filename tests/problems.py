# SPDX-License-Identifier: Apache-2.0
"""Weights, activations and backends to test with, and ggml's own C code through ctypes."""

import copy
import ctypes
import functools
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import typing
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import reference

import baracuda_cy as bcy
from baracuda_cy import _cuda

FORMATS = list(reference.FORMATS)
FLOATS = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
BITS = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}
EMULATED = _cuda.why_unavailable() is None and _cuda.device_name() == "Emulated GPU"
BACKENDS = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

# Byte offsets of a block's scales in half precision.
_HALVES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "IQ4_NL": [0],
    "IQ4_XS": [0],
}


def block_size(name):
    return reference.FORMATS[name][1]


def packed_bytes(name, nrows, ncols):
    _, elements, size = reference.FORMATS[name]
    return nrows * ncols // elements * size


def random_weight(name, nrows, ncols, seed=0):
    """Packed blocks of every bit pattern, with scales of ordinary size and either sign."""
    rng = np.random.default_rng([seed, nrows, ncols, reference.FORMATS[name][0]])
    size = reference.FORMATS[name][2]
    data = rng.integers(0, 256, (packed_bytes(name, nrows, ncols) // size, size), np.uint8)
    for at in _HALVES.get(name, []):
        scale = rng.normal(0, 0.05, len(data)).astype(np.float16)
        data[:, at : at + 2] = scale[:, None].view(np.uint8)
    if name == "Q8_K":
        data[:, :4] = rng.normal(0, 0.01, (len(data), 1)).astype(np.float32).view(np.uint8)
    if name == "MXFP4":
        data[:, 0] = rng.integers(118, 128, len(data))
    return data.reshape(-1)


def random_activations(m, k, dtype="float32", seed=1):
    """Normal tokens with a few outliers and a zero group."""
    rng = np.random.default_rng([seed, m, k])
    x = rng.standard_normal((m, k)).astype(np.float32)
    x *= np.where(rng.random((m, k)) < 0.01, 20, 1)
    if m and k:
        x[-1, :32] = 0
    return x.astype(FLOATS[dtype])


@functools.lru_cache(maxsize=1)
def gaussian():
    """A weight and tokens to measure errors with; an emulated GPU takes its time."""
    rng = np.random.default_rng(11)
    weight = rng.normal(0, 0.02, (128 if EMULATED else 1024, 4096)).astype(np.float32)
    return weight, rng.standard_normal((16, 4096)).astype(np.float32)


def bits(array):
    return np.asarray(array).view({2: np.uint16, 4: np.uint32}[np.asarray(array).dtype.itemsize])


def bias_of(n, dtype):
    return np.random.default_rng(n).standard_normal(n).astype(FLOATS[dtype])


class _Strided:
    """A CUDA array that only has the CUDA array interface."""

    def __init__(self, owner, interface):
        self.owner = owner
        self.__cuda_array_interface__ = interface


class Backend:
    """Arrays of a device without any framework."""

    def __init__(self, device):
        self.device = device

    def put(self, array, padding=0):
        """`array` on the device, its rows `padding` elements further apart than they need be."""
        rows, cols = array.shape if array.ndim == 2 else (1, array.size)
        wide = np.zeros((rows, cols + padding), array.dtype)
        wide[:, :cols] = array.reshape(rows, cols)
        if self.device == "cpu":
            return wide[:, :cols].reshape(array.shape) if array.ndim == 2 else wide[0, :cols]
        if not padding:
            return bcy.DeviceArray.from_host(array, device=self.device)
        buffer = bcy.DeviceBuffer.from_host(wide.view(np.uint8).reshape(-1), device=self.device)
        interface = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (buffer.ptr, False),
            "strides": (wide.strides[0], wide.strides[1]) if array.ndim == 2 else None,
            "version": 3,
            "stream": 1,
        }
        return _Strided(buffer, interface)

    def empty(self, shape, dtype, padding=0):
        """An array filled with a pattern that no result has."""
        array = np.full(shape, 77, FLOATS[dtype])
        return self.put(array, padding)

    def get(self, array):
        if self.device == "cpu":
            return np.asarray(array)
        if isinstance(array, bcy.DeviceArray):
            return array.to_host()
        interface = array.__cuda_array_interface__
        kind = np.dtype(interface["typestr"])
        data = np.asarray(array.owner.copy_to_host()).view(np.uint8).view(kind)
        width = interface["strides"][0] // kind.itemsize
        return data.reshape(-1, width)[:, : interface["shape"][-1]]

    def workspace(self, plan):
        if not plan.workspace_size:
            return None
        return bcy.Workspace(plan.workspace_size, device=self.device)

    def run(self, plan, weight, x, bias=None, padding=(0, 0), workspace=None):
        """Run a product plan on NumPy arrays; a NumPy result."""
        d = plan.descriptor
        y = self.empty((d.m, d.nrows), d.output.dtype, padding[1])
        plan.run(
            weight if not isinstance(weight, np.ndarray) else self.put(weight),
            self.put(x, padding[0]),
            y,
            bias=None if bias is None else self.put(bias),
            workspace=self.workspace(plan) if workspace is None else workspace,
        )
        return self.get(y)


def _plan(kind, descriptor, device, name, nrows, ncols, preference=None, **fields):
    problem = descriptor(nrows=nrows, ncols=ncols, block_format=name, **fields)
    return kind.select(device, problem, preference)


def staged_plan(device, name, nrows, ncols, m, activation="float32", output="float32", **more):
    more |= {"m": m, "activation": activation, "output": output}
    kind = (bcy.GgufMmvqMultiMPlan, bcy.GgufMmvqMultiMDescriptor)
    return _plan(*kind, device, name, nrows, ncols, **more)


def float_plan(device, name, nrows, ncols, m, activation="float32", output=None, **more):
    more |= {"m": m, "activation": activation, "output": output}
    kind = (bcy.GgufMmvqPlan, bcy.GgufMmvqDescriptor)
    return _plan(*kind, device, name, nrows, ncols, **more)


def dequantize_plan(device, name, nrows, ncols, output="float32", **more):
    kind = (bcy.GgufDequantizePlan, bcy.GgufDequantizeDescriptor)
    return _plan(*kind, device, name, nrows, ncols, output=output, **more)


# ---- errors --------------------------------------------------------------------------------------

# What every message says: which argument, what was expected, what was given, what to do.
SHAPE = re.compile(r"^[\w.]+: expected .+, got .+; .+", re.DOTALL)


def refused(plan, arguments, error, match, **changed):
    """The call with one argument changed raises, as `validate` does, and writes nothing."""
    arguments = {**arguments, **changed}
    output = arguments["output"]
    before = np.array(output) if isinstance(output, np.ndarray) else None
    with pytest.raises(error, match=match) as caught:
        plan.run(**arguments)
    assert SHAPE.match(str(caught.value)), caught.value
    assert isinstance(caught.value, bcy.BaracudaError)
    if before is not None:
        np.testing.assert_array_equal(np.array(output), before)
    only_run = {"workspace", "stream"}
    if not only_run & changed.keys():
        checked = {name: value for name, value in arguments.items() if name not in only_run}
        with pytest.raises(error, match=match):
            plan.validate(**checked)
        assert plan.can_implement(**checked) is False


# ---- beside the test -----------------------------------------------------------------------------


class Load:
    """Two threads that run what ``work(seed)`` gives, over and over, until the test is through."""

    def __init__(self, work):
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self.run, args=(work, i)) for i in range(2)]

    def run(self, work, seed):
        call = work(seed)
        while not self.stop.is_set():
            call()

    def __enter__(self):
        for thread in self.threads:
            thread.start()

    def __exit__(self, *_):
        self.stop.set()
        for thread in self.threads:
            thread.join()


def child(code, *, expect=0, **environment):
    """What code prints in a process of its own that can import the tests; nothing on stderr.

    None takes a variable out of the environment.
    """
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env={name: value for name, value in environment.items() if value is not None},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (expect, ""), f"{done.returncode}: {done.stderr}"
    return done.stdout.strip()


def in_another_process(module, expression, **environment):
    """What an expression over a test module, called `t`, is in a process of its own, by JSON."""
    code = f"""
        import json
        import {module} as t
        from baracuda_cy import _cpu
        print(json.dumps({expression}))
    """
    return json.loads(child(code, **environment))


# ---- weights -------------------------------------------------------------------------------------

CODEBOOKS = ["NF4", "FP4"]
LAYOUTS = ["bitsandbytes", "row_pair"]


class Weight:
    """A weight [n, k] in NumPy arrays, what it stands for, and products with it."""

    def product(
        self,
        backend,
        x,
        output=None,
        bias=None,
        padding=(0, 0),
        preference=None,
        tensor=None,
        plan=None,
        stream=None,
    ):
        """A product on NumPy arrays; a NumPy result."""
        activation = next(name for name, dtype in FLOATS.items() if x.dtype == dtype)
        m = x.shape[0]
        output = output or activation
        if plan is None:
            plan = self.plan(backend.device, m, activation, output, bias is not None, preference)
        y = backend.empty((m, self.n), output, padding[1])
        plan.run(
            self.tensor(backend) if tensor is None else tensor,
            backend.put(x, padding[0]),
            y,
            bias=None if bias is None else backend.put(bias),
            workspace=backend.workspace(plan),
            stream=stream,
        )
        if stream is not None:
            stream.synchronize()
        return backend.get(y)


def _is_float(preference):
    return preference is not None and preference.activations == "float"


class GgufWeight(Weight):
    """Blocks of every bit pattern with scales of ordinary size."""

    def __init__(self, n, k, name="Q4_K", seed=0):
        self.n, self.k, self.name = n, k, name
        self.data = random_weight(name, n, k, seed)

    def any_scales(self, rng):
        """Make scales, and all else, of any bits."""
        self.data = rng.integers(0, 256, self.data.size, np.uint8)

    def rows(self, first, count):
        """Some rows of it."""
        part = copy.copy(self)
        part.n, size = count, packed_bytes(self.name, 1, self.k)
        part.data = self.data[first * size : (first + count) * size]
        return part

    def _decoded(self):
        return reference.decode(self.data, self.name, self.n, self.k)

    def values(self):
        return self._decoded().values()

    def exact_product(self, x, preference=None):
        """What the kernels give before bias and rounding."""
        rule = reference.float_product if _is_float(preference) else reference.staged_product
        return rule(self._decoded(), x.astype(np.float32))

    def tensor(self, backend=None):
        data = (backend or Backend("cpu")).put(self.data)
        return bcy.GgufTensor(data, self.name, (self.n, self.k))

    def plan(self, device, m, activation="float32", output=None, bias=False, preference=None):
        """It takes a bias or none."""
        make = float_plan if _is_float(preference) else staged_plan
        output = output or activation
        return make(device, self.name, self.n, self.k, m, activation, output, preference=preference)

    def unpacking(self, device, output="float32"):
        return dequantize_plan(device, self.name, self.n, self.k, output)


class Nf4Weight(Weight):
    """Codes of every value with scales of ordinary size, in NumPy arrays, and what they stand for.

    `nested` is the block size of the nested scales.
    """

    def __init__(
        self, n, k, block_size=64, codebook="NF4", layout="bitsandbytes", nested=None, seed=0
    ):
        self.n, self.k, self.block_size = n, k, block_size
        self.codebook, self.layout = codebook, layout
        rng = np.random.default_rng([seed, n, k, block_size])
        blocks = -(-n * k // block_size)
        self.data = rng.integers(0, 256, (n * k + 1) // 2, np.uint8)
        self.absmax = rng.uniform(0.01, 0.1, blocks).astype(np.float32)
        self.nested = None
        if nested:
            self.absmax = rng.integers(0, 256, blocks, np.uint8)
            code = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
            scales = rng.uniform(0.01, 0.03, -(-blocks // nested)).astype(np.float32)
            self.nested = (code, scales, np.float32(0.05), nested)

    def any_scales(self, rng):
        """Make scales of any bits."""
        self.absmax = rng.integers(0, 2**32, self.absmax.size, np.uint32).view(np.float32)

    def rows(self, first, count):
        """Some rows of it, which are whole blocks."""
        part = copy.copy(self)
        part.n, begin, size = count, first * self.k, count * self.k
        part.data = self.data[begin // 2 : (begin + size) // 2]
        begin, blocks = begin // self.block_size, size // self.block_size
        part.absmax = self.absmax[begin : begin + blocks]
        if self.nested:
            code, scales, offset, block = self.nested
            begin, count = begin // block, -(-blocks // block)
            part.nested = (code, scales[begin : begin + count], offset, block)
        return part

    @property
    def how(self):
        return {
            "block_size": self.block_size,
            "codebook": self.codebook,
            "layout": self.layout,
        }

    def reference(self, function):
        return function(self.data, self.absmax, self.n, self.k, nested=self.nested, **self.how)

    def values(self):
        return self.reference(reference.nf4_values)

    def exact_product(self, x, preference=None):
        """What the kernels with the bits of the CPU give before bias and rounding."""
        return reference.codes_product(*self.reference(reference.nf4_parts), x)

    def parts(self, backend):
        """Arrays on the backend's device: codes, absmax and nesting, as `run` takes them."""
        nested = self.nested
        if nested is not None:
            code, scales, offset, block = nested
            nested = bcy.NestedAbsmax(backend.put(code), backend.put(scales), offset, block)
        return backend.put(self.data), backend.put(self.absmax), nested

    def tensor(self, backend=None):
        data, absmax, nested = self.parts(backend or Backend("cpu"))
        return bcy.Nf4Tensor(data, absmax, (self.n, self.k), nested=nested, **self.how)

    def descriptor(self, m=None, **more):
        base = bcy.Nf4Descriptor(
            n=self.n, k=self.k, nested=self.nested is not None, **self.how, **more
        )
        return base if m is None else bcy.Nf4MmvqMultiMDescriptor(base=base, m=m)

    def plan(self, device, m, activation="float32", output=None, bias=False, preference=None):
        descriptor = self.descriptor(m, activation=activation, output=output, bias=bias)
        return bcy.Nf4MmvqMultiMPlan.select(device, descriptor, preference)

    def unpacking(self, device, output="float32"):
        return bcy.Nf4DequantizePlan.select(device, self.descriptor(output=output))


EXACT = bcy.PlanPreference(bit_stable_across_hardware=True)
# The default and, where it may differ, the one with the bits of the CPU.
NF4_PATHS = [
    pytest.param(("cpu", None), id="cpu"),
    pytest.param(("cuda", None), id="cuda", marks=pytest.mark.gpu),
    pytest.param(("cuda", EXACT), id="cuda-exact", marks=pytest.mark.gpu),
]


# ---- ways to multiply ----------------------------------------------------------------------------


class Product(typing.NamedTuple):
    """A kind of weight, the preference it is multiplied with, and activations that it is for."""

    name: str
    weight: typing.Callable  # of n, k and a seed
    preference: bcy.PlanPreference | None = None
    activation: str = "float32"

    def tokens(self, m, k, seed=1):
        return random_activations(m, k, self.activation, seed)

    def plan(self, device, weight, m):
        return weight.plan(device, m, self.activation, preference=self.preference)

    def run(self, backend, weight, x, *arguments, **more):
        """The bits of a product."""
        return bits(weight.product(backend, x, *arguments, preference=self.preference, **more))


def gguf_products(*names):
    """On both paths."""
    for name in names:
        weight = functools.partial(GgufWeight, name=name)
        yield Product(f"{name}-staged", weight)
        yield Product(f"{name}-float", weight, bcy.PlanPreference(activations="float"))


def nf4_product(name="nf4", preference=None, activation="float16", **how):
    return Product(name, functools.partial(Nf4Weight, **how), preference, activation)


PRODUCTS = [
    *gguf_products("Q4_K"),
    nf4_product(nested=256),
    nf4_product("nf4-exact", EXACT, nested=256),
]


def each(argument, products):
    """Parametrize a test with products."""
    return pytest.mark.parametrize(argument, products, ids=lambda product: product.name)


# ---- ggml ----------------------------------------------------------------------------------------


class Ggml:
    """ggml's C code from the libggml-python wheel."""

    def __init__(self):
        libggml = pytest.importorskip("libggml", reason="libggml-python is not installed")
        (path,) = Path(libggml.__file__).parent.glob("lib*/libggml-base.so")
        self.library = ctypes.CDLL(str(path))
        self.library.ggml_quantize_chunk.restype = ctypes.c_size_t

    @staticmethod
    def _pointer(array):
        return array.ctypes.data_as(ctypes.c_void_p)

    def dequantize(self, name, data, shape):
        # The symbols are q4_0 and iq4_nl, but q4_K and iq4_xs.
        symbol = name.lower().replace("_k", "_K")
        data, out = np.ascontiguousarray(data), np.empty(shape, np.float32)
        function = getattr(self.library, f"dequantize_row_{symbol}")
        function(self._pointer(data), self._pointer(out), ctypes.c_int64(out.size))
        return out

    def quantize(self, name, array):
        """Packed bytes, a row of them for each row, without an importance matrix."""
        array = np.ascontiguousarray(array, np.float32)
        nrows, ncols = array.shape
        data = np.zeros((nrows, packed_bytes(name, 1, ncols)), np.uint8)
        if name == "Q8_K":  # ggml_quantize_chunk has no such case
            self.library.quantize_row_q8_K_ref(
                self._pointer(array), self._pointer(data), ctypes.c_int64(array.size)
            )
            return data
        written = self.library.ggml_quantize_chunk(
            ctypes.c_int(reference.FORMATS[name][0]),
            self._pointer(array),
            self._pointer(data),
            ctypes.c_int64(0),
            ctypes.c_int64(nrows),
            ctypes.c_int64(ncols),
            None,
        )
        assert written == data.size
        return data
