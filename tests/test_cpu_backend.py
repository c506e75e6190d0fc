# SPDX-License-Identifier: Apache-2.0
"""What only the CPU backend has: instruction sets, threads, the caller's rounding mode."""

import ctypes
import functools
import os
import threading

import numpy as np
import problems
import pytest
import reference
from problems import (
    FLOATS,
    FORMATS,
    Backend,
    bits,
    block_size,
    child,
    random_activations,
    random_weight,
)

import baracuda_cy as bcy
from baracuda_cy import _cpu

CPU = Backend("cpu")
PATHS = {"staged": problems.staged_plan, "float": problems.float_plan}
ISAS = ["baseline", "avx2", "avx512_vnni"]

# Every way in which K can divide into units of 256 and spans of eight units: less than a unit, part
# of a unit, few units (weight rows share a vector), whole spans, whole spans and some.
COLUMNS = [32, 96, 256, 288, 512, 768, 1024, 1056, 1280, 1792, 2048, 2080, 2304, 4096, 4352, 6176]


# ---- instruction sets ----------------------------------------------------------------------------


@functools.cache
def best_isa():
    return child("from baracuda_cy import _cpu; print(_cpu.isa())", BARACUDA_CPU_ISA=None)


def need(isa):
    if ISAS.index(isa) > ISAS.index(best_isa()):
        pytest.skip(f"this CPU has no {isa}")


@pytest.mark.parametrize("asked", ["baseline", "avx2", "avx512", ""])
def test_the_instruction_set_can_only_be_lowered(asked):
    used = child("from baracuda_cy import _cpu; print(_cpu.isa())", BARACUDA_CPU_ISA=asked)
    ceiling = {"baseline": 0, "avx2": 1}.get(asked, 2)
    assert used == ISAS[min(ceiling, ISAS.index(best_isa()))]


def check_every_shape(isa):
    """Both products and dequantize against the specification, in this process."""
    assert _cpu.isa() == isa
    for name in FORMATS:
        for k in COLUMNS:
            if k % block_size(name):
                continue
            n, m = (19, 3) if k < 2048 else (5, 2)
            weight = random_weight(name, n, k)
            decoded = reference.decode(weight, name, n, k)
            x = random_activations(m, k)
            want = {
                "staged": reference.finish(reference.staged_product(decoded, x)),
                "float": reference.finish(reference.float_product(decoded, x)),
            }
            for path, make in PATHS.items():
                got = bits(CPU.run(make("cpu", name, n, k, m), weight, x))
                np.testing.assert_array_equal(got, want[path], f"{name} {path} K={k}")
                got = bits(CPU.run(make("cpu", name, n, k, 1), weight, x[:1]))
                np.testing.assert_array_equal(got, want[path][:1], f"{name} {path} K={k} M=1")
            y = CPU.empty((n, k), "float32")
            problems.dequantize_plan("cpu", name, n, k).run(weight, y)
            np.testing.assert_array_equal(bits(y), bits(decoded.values()), f"{name} K={k}")


@pytest.mark.parametrize("isa", ISAS)
def test_every_shape_has_the_specified_bits(isa):
    need(isa)
    child(
        f"import test_cpu_backend as t; t.check_every_shape({isa!r})",
        BARACUDA_CPU_ISA=isa.removesuffix("_vnni"),
    )


class Fence:
    """Bytes with inaccessible memory right before (`at="start"`) or right after them."""

    def __init__(self, nbytes, at):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        page = os.sysconf("SC_PAGE_SIZE")
        inside = -(-nbytes // page) * page
        private_anonymous = 0x22
        start = libc.mmap(None, inside + 2 * page, 3, private_anonymous, -1, 0)
        assert start not in (None, ctypes.c_void_p(-1).value)
        assert libc.mprotect(start, page, 0) == 0
        assert libc.mprotect(start + page + inside, page, 0) == 0
        first = start + page + (0 if at == "start" else inside - nbytes)
        self.bytes = np.frombuffer((ctypes.c_uint8 * nbytes).from_address(first), np.uint8)

    @classmethod
    def around(cls, array, at):
        fence = cls(array.nbytes, at)
        fence.bytes[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return fence.bytes.view(array.dtype).reshape(array.shape)


def check_bounds():
    """Ends the process with a signal if anything is touched outside of the arrays."""
    for name in FORMATS:
        for k in (block_size(name), 512, 768, 1024, 2048, 2304, 4096):
            for dtype in FLOATS:
                for at in ("start", "end"):
                    n, m = 3, 2
                    weight = Fence.around(random_weight(name, n, k), at)
                    x = Fence.around(random_activations(m, k, dtype), at)
                    bias = Fence.around(np.ones(n, FLOATS[dtype]), at)
                    for make in PATHS.values():
                        plan = make("cpu", name, n, k, m, dtype, dtype)
                        y = Fence.around(np.zeros((m, n), FLOATS[dtype]), at)
                        scratch = None
                        if plan.workspace_size:
                            scratch = bcy.Workspace(buffer=Fence(plan.workspace_size, at).bytes)
                        plan.run(weight, x, y, bias=bias, workspace=scratch)
                    y = Fence.around(np.zeros((n, k), FLOATS[dtype]), at)
                    problems.dequantize_plan("cpu", name, n, k, dtype).run(weight, y)


@pytest.mark.parametrize("isa", ISAS)
def test_nothing_is_touched_outside_of_the_arrays(isa):
    need(isa)
    child(
        "import test_cpu_backend as t; t.check_bounds()",
        BARACUDA_CPU_ISA=isa.removesuffix("_vnni"),
    )


def test_the_fence_stops_who_crosses_it():
    crossing = """
        import ctypes, test_cpu_backend as t
        ctypes.string_at(t.Fence(100, "end").bytes.ctypes.data, 101)
    """
    child(crossing, expect=-11)


# ---- threads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", list(PATHS))
@pytest.mark.parametrize("name", ["Q4_0", "Q6_K"])
@pytest.mark.parametrize("m", [1, 7])
def test_threads_do_not_change_the_bits(path, name, m):
    n, k = 1003, 1280
    weight, x = random_weight(name, n, k), random_activations(m, k)

    def product(threads):
        preference = bcy.PlanPreference(threads=threads)
        return bits(CPU.run(PATHS[path]("cpu", name, n, k, m, preference=preference), weight, x))

    alone = product(1)
    for threads in (2, 3, 8, 200):
        np.testing.assert_array_equal(product(threads), alone)


def test_threads_do_not_change_what_is_dequantized():
    n, k = 1003, 1280
    weight, results = random_weight("Q5_K", n, k), []
    for threads in (1, 5):
        y = CPU.empty((n, k), "bfloat16")
        preference = bcy.PlanPreference(threads=threads)
        problems.dequantize_plan("cpu", "Q5_K", n, k, "bfloat16", preference=preference).run(
            weight, y
        )
        results.append(bits(y))
    np.testing.assert_array_equal(*results)


def test_the_number_of_threads():
    ask = "from baracuda_cy import _cpu; print(_cpu.default_threads())"
    available = str(len(os.sched_getaffinity(0)))
    assert child(ask, BARACUDA_THREADS="3") == "3"
    for nonsense in ("", "0", "-2", "many", "4x", "1025"):
        assert child(ask, BARACUDA_THREADS=nonsense) == available
    pinned = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n" + ask
    assert child(pinned, BARACUDA_THREADS="") == "1"


def threads_of_this_process():
    return len(os.listdir("/proc/self/task"))


def started_threads(n, k, threads):
    plan = problems.staged_plan(
        "cpu", "Q8_0", n, k, 1, preference=bcy.PlanPreference(threads=threads)
    )
    weight, x = random_weight("Q8_0", n, k), random_activations(1, k)
    before = threads_of_this_process()
    CPU.run(plan, weight, x)
    return threads_of_this_process() - before


def test_threads_start_when_there_is_work_for_them():
    code = """
        import test_cpu_backend as t
        print(t.started_threads(16, 64, 4), t.started_threads(4096, 1024, 4),
              t.started_threads(4096, 1024, 3), t.started_threads(4096, 1024, 6))
    """
    assert child(code) == "0 3 0 2"


def test_plans_of_all_kinds_at_once():
    cases = []
    for i, name in enumerate(FORMATS):
        n, k, m = 257, 768, 1 + i % 3
        preference = bcy.PlanPreference(threads=2 + i % 3)
        plan = list(PATHS.values())[i % 2]("cpu", name, n, k, m, preference=preference)
        weight, x = random_weight(name, n, k), random_activations(m, k)
        cases.append((plan, weight, x, bits(CPU.run(plan, weight, x))))
    wrong, barrier = [], threading.Barrier(len(cases))

    def work(plan, weight, x, want):
        barrier.wait()
        runs = (bits(CPU.run(plan, weight, x)) for _ in range(50))
        wrong.extend(plan for y in runs if (y != want).any())

    callers = [threading.Thread(target=work, args=case) for case in cases]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_fork_while_the_threads_work():
    """The child has neither the threads nor what they held: its first call starts over."""
    code = """
        import os, sys, threading, warnings
        warnings.simplefilter("ignore")
        import numpy as np
        import test_cpu_backend as t
        from problems import bits, random_activations, random_weight
        plan = t.problems.staged_plan("cpu", "Q4_K", 2048, 1024, 2)
        weight, x = random_weight("Q4_K", 2048, 1024), random_activations(2, 1024)
        want = bits(t.CPU.run(plan, weight, x))
        stop = threading.Event()
        def work():
            while not stop.is_set():
                t.CPU.run(plan, weight, x)
        busy = [threading.Thread(target=work) for _ in range(2)]
        for thread in busy: thread.start()
        children = []
        for _ in range(10):
            child = os.fork()
            if not child:
                os._exit(0 if (bits(t.CPU.run(plan, weight, x)) == want).all() else 1)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        stop.set()
        for thread in busy: thread.join()
        print(codes, (bits(t.CPU.run(plan, weight, x)) == want).all())
    """
    assert child(code, BARACUDA_THREADS="4") == f"{[0] * 10} True"


def test_the_process_ends_while_threads_work():
    code = """
        import threading
        import test_cpu_backend as t
        from problems import random_activations, random_weight
        plan = t.problems.staged_plan("cpu", "Q4_K", 2048, 1024, 2)
        weight, x = random_weight("Q4_K", 2048, 1024), random_activations(2, 1024)
        t.CPU.run(plan, weight, x)
        def work():
            while True:
                t.CPU.run(plan, weight, x)
        for _ in range(2):
            threading.Thread(target=work, daemon=True).start()
        print("done")
    """
    assert child(code, BARACUDA_THREADS="4") == "done"


# ---- the caller's floating-point environment -----------------------------------------------------


class FloatEnvironment:
    """x86's MXCSR, through the C library's fenv_t."""

    AT = 7  # 32-bit words of x87 state before it
    FLUSH_TO_ZERO, DENORMALS_ARE_ZERO, UPWARD, TOWARD_ZERO = 0x8000, 0x0040, 0x4000, 0x6000

    def __init__(self):
        self.libm = ctypes.CDLL("libm.so.6")
        self.environment = (ctypes.c_uint32 * 8)()

    def get(self):
        self.libm.fegetenv(self.environment)
        return self.environment[self.AT]

    def set(self, mxcsr):
        self.libm.fegetenv(self.environment)
        self.environment[self.AT] = mxcsr
        self.libm.fesetenv(self.environment)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="MXCSR is x86's")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("path", [*PATHS, "dequantize"])
@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q8_0", "MXFP4"])
def test_the_callers_environment_changes_nothing_and_is_given_back(name, path, threads):
    n, k = 1000, 1024
    weight = random_weight(name, n, k)
    x = random_activations(1, k) * np.float32(2.0**-118)
    preference = bcy.PlanPreference(threads=threads)
    if path == "dequantize":
        if name == "MXFP4":
            weight.reshape(-1, 17)[:, 0] = 1  # values of 2^-127
        plan = problems.dequantize_plan("cpu", name, n, k, "float16", preference=preference)
        y = CPU.empty((n, k), "float16")
        run = functools.partial(plan.run, weight, y)
    else:
        plan = PATHS[path]("cpu", name, n, k, 1, preference=preference)
        y = CPU.empty((1, n), "float32")
        run = functools.partial(plan.run, weight, x, y, workspace=CPU.workspace(plan))
    run()
    want = bits(y).copy()
    environment = FloatEnvironment()
    usual = environment.get()
    flush = environment.FLUSH_TO_ZERO | environment.DENORMALS_ARE_ZERO
    for asked in (flush, environment.UPWARD, environment.TOWARD_ZERO | flush):
        y.fill(77)
        environment.set(usual | asked)
        try:
            run()
            kept = environment.get()
        finally:
            environment.set(usual)
        assert kept & 0xFFC0 == (usual | asked) & 0xFFC0
        np.testing.assert_array_equal(bits(y), want)
