# SPDX-License-Identifier: Apache-2.0
"""Time the host side of one call: what `plan.run` costs above the launch of its kernels.

    python benchmarks/bench_call.py --output benchmarks/results/call-h100.json
    python benchmarks/bench_call.py --device cpu

By kind of array; frameworks that are not installed are left out. Loops of 300 calls with no
synchronization inside; reported are the median and the lowest of 25 loops, a call. The bare launch
is the same C functions on plain addresses, less what ctypes needs to call them. With
apache-tvm-ffi installed, its empty function taking three of the same arrays stands beside.
"""

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import harness
import native
import numpy as np
import render

import baracuda_cy as bcy

NROWS = NCOLS = 256
LOOPS, CALLS = 25, 300
ONE_THREAD = bcy.PlanPreference(threads=1)


class Framework(NamedTuple):
    """What it takes to time calls on one kind of array."""

    name: str
    asarray: Callable[[np.ndarray], Any]
    synchronize: Callable[[], Any]


def frameworks(device: str) -> Iterator[Framework]:
    """Yield what is installed and works on `device`."""
    cuda = device == "cuda"
    with contextlib.suppress(ImportError):
        import torch

        if not cuda:
            yield Framework("torch", torch.from_numpy, nothing)
        elif torch.cuda.is_available():
            to_gpu = lambda a: torch.from_numpy(a).cuda()  # noqa: E731
            yield Framework("torch", to_gpu, torch.cuda.synchronize)
    if cuda:
        with contextlib.suppress(ImportError):
            import cupy

            yield Framework("cupy", cupy.asarray, cupy.cuda.Device().synchronize)
    with contextlib.suppress(ImportError):
        import jax

        with contextlib.suppress(RuntimeError):  # a JAX without this backend
            where = jax.devices(device)[0]
            put = lambda a: jax.device_put(a, where).block_until_ready()  # noqa: E731
            yield Framework("jax", put, bcy.LEGACY_DEFAULT_STREAM.synchronize if cuda else nothing)
    if not cuda:
        yield Framework("numpy", lambda a: a, nothing)


def nothing() -> None:
    """Wait for nothing, as there is nothing to wait for on the CPU."""


def address_of(array: Any) -> int:
    """Return the address of an array's first element."""
    for method in ("data_ptr", "unsafe_buffer_pointer"):  # torch, JAX
        if hasattr(array, method):
            return getattr(array, method)()
    for attribute in ("__cuda_array_interface__", "__array_interface__"):
        if hasattr(array, attribute):
            return getattr(array, attribute)["data"][0]
    raise TypeError(f"no address known of {type(array).__name__}")


class Bench:
    """The calls on one framework's arrays; `cells` is what was measured."""

    def __init__(self, device: str, framework: Framework, calls: int) -> None:
        self.device, self.framework, self.calls = device, framework, calls
        self.cells: list[dict[str, Any]] = []

    def time(self, call: Callable[[], Any]) -> tuple[float, float]:
        """Return the median and the lowest microseconds of a call over the loops."""
        for _ in range(20):
            call()
        self.framework.synchronize()
        loops = []
        for _ in range(LOOPS):
            start = time.perf_counter()
            for _ in range(self.calls):
                call()
            loops.append((time.perf_counter() - start) / self.calls * 1e6)
            self.framework.synchronize()
        return statistics.median(loops), min(loops)

    def add(self, name: str, measured: tuple[float, float]) -> tuple[float, float]:
        us, lowest = (round(value, 3) for value in measured)
        entry = {"device": self.device, "array": self.framework.name, "call": name}
        self.cells.append({**entry, "us": us, "us_lowest": lowest})
        return measured

    def bare(self, **addresses: int) -> tuple[float, float]:
        """Time staging and product from C on plain addresses."""
        functions = native.Native(self.device)
        if self.device == "cuda":  # where the product stages
            steps, where = [functions.matmul], bcy.LEGACY_DEFAULT_STREAM.handle
        else:  # on one thread
            steps, where = [functions.stage, functions.matmul], 1

        def both(m: int) -> Callable[[], Any]:
            arguments = native.MatmulArgs(
                **addresses,
                nrows=NROWS,
                ncols=NCOLS,
                m=m,
                x_stride=NCOLS,
                y_stride=NROWS,
                format=int(bcy.GgufBlockFormat.Q4_0),
                x_type=native.ELEMENT["float32"],
                y_type=native.ELEMENT["float32"],
            )

            def call(arguments=arguments) -> None:
                for function in steps:
                    function(native.address(arguments), where)

            return call

        # With M = 0 the same functions return at once: what is left is the way there.
        return difference(self.time(both(1)), self.time(both(0)))

    def run(self) -> None:
        """Measure every call of this framework."""
        name, asarray, synchronize = self.framework
        cuda = self.device == "cuda"
        place = "cuda:0" if cuda else "cpu"
        rng = np.random.default_rng(0)
        tensor = bcy.quantize(rng.standard_normal((NROWS, NCOLS), dtype=np.float32), "Q4_0")
        w = asarray(np.asarray(tensor.data).view(np.uint8).ravel().copy())
        x = asarray(rng.standard_normal((1, NCOLS), dtype=np.float32))
        no_x = asarray(np.zeros((0, NCOLS), np.float32))

        def output(m: int) -> Any:
            if name != "jax":
                return asarray(np.zeros((m, NROWS), np.float32))
            if cuda:  # JAX arrays are immutable: they cannot be outputs
                return bcy.DeviceArray.empty((m, NROWS), "float32")
            return np.zeros((m, NROWS), np.float32)

        def select(m: int) -> bcy.GgufMmvqMultiMPlan:
            descriptor = bcy.GgufMmvqMultiMDescriptor(
                nrows=NROWS, ncols=NCOLS, m=m, block_format="Q4_0"
            )
            return bcy.GgufMmvqMultiMPlan.select(place, descriptor, ONE_THREAD)

        y, no_y = output(1), output(0)
        plan, idle = select(1), select(0)
        workspace = bcy.Workspace(plan.workspace_size, device=place)
        synchronize()

        ours = self.add(
            "plan.run",
            self.time(lambda: plan.run(w, x, y, workspace=workspace)),
        )
        bare = self.add(
            "the same kernels launched bare",
            self.bare(
                weight=address_of(w),
                x=address_of(x),
                y=address_of(y),
                workspace=workspace.ptr,
            ),
        )
        self.add("plan.run above the bare launch", difference(ours, bare))
        self.add(
            "plan.run with M = 0, which launches nothing",
            self.time(lambda: idle.run(w, no_x, no_y, workspace=workspace)),
        )
        if cuda:
            stream = bcy.LEGACY_DEFAULT_STREAM
            self.add(
                "plan.run with a stream given",
                self.time(lambda: plan.run(w, x, y, workspace=workspace, stream=stream)),
            )
        weight = bcy.GgufTensor(w, "Q4_0", shape=(NROWS, NCOLS))
        if name != "jax":
            self.add(
                "linear(x, w, out=y)",
                self.time(lambda: bcy.linear(x, weight, out=y, preference=ONE_THREAD)),
            )
        self.add("linear(x, w)", self.time(lambda: bcy.linear(x, weight, preference=ONE_THREAD)))
        self.add("x + x of the framework", self.time(lambda: x + x))
        with contextlib.suppress(ImportError):
            import tvm_ffi

            empty = tvm_ffi.get_global_func("testing.nop")
            self.add("empty tvm-ffi function of 3 arrays", self.time(lambda: empty(w, x, x)))


def difference(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    return a[0] - b[0], a[1] - b[1]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.common_arguments(parser)
    options = parser.parse_args(arguments)
    device = harness.choose_device(options.device)
    calls = 30 if options.quick else CALLS
    settings = {"loops": LOOPS, "calls": calls, "quick": options.quick}
    result = harness.document("call", settings, harness.machine(options.commit))
    for framework in frameworks(device):
        bench = Bench(device, framework, calls)
        bench.run()
        result["cells"] += bench.cells
    return render.publish(result, options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
