# SPDX-License-Identifier: Apache-2.0
"""Small cases of every CUDA operation and format, for compute-sanitizer: `make sanitize`.

Only this package and NumPy touch the GPU, so that what the sanitizer reports is ours. Results are
compared with the CPU backend's, bit for bit.
"""

import sys

import numpy as np

import baracuda_cy as bcy
from baracuda_cy import _cuda

NROWS = 19  # one whole tile of rows and a part of one
MANY_ROWS = 3 * 32 * _cuda.multiprocessors() + 19  # enough for boxes of 32 rows, but for five bits
SOME_ROWS = 48 * _cuda.multiprocessors() + 5  # enough for tiles of 32 rows
# Rows and tokens for boxes of five bits, and for tiles of 32 rows of Q2_K, one to a multiprocessor.
OTHER_TILES = {
    "Q5_0": (12 * 32 * _cuda.multiprocessors() + 19, 8),
    "Q5_K": (12 * 32 * _cuda.multiprocessors() + 19, 8),
    "Q2_K": (24 * _cuda.multiprocessors() + 5, 16),
}
# Tokens, rows and columns that are enough for the kernel for many tokens on Hopper: several tiles
# to a thread block, or parts of one.
MANY_TOKENS = [
    ("Q4_1", 12, 256 * _cuda.multiprocessors() - 5, 2048),
    ("Q2_K", 20, 256 * _cuda.multiprocessors() - 5, 2048),
    ("Q4_1", 40, 32 * _cuda.multiprocessors() - 7, 7168),
]
# Rows and columns of NF4, and tokens: boxes of 128 rows, four to a thread block, or of 32, one to
# each, and tiles of 16 or 32 rows, several to a thread block.
MANY_NF4 = {
    (512 * _cuda.multiprocessors() - 5, 832): (5, 16, 32),
    (32 * _cuda.multiprocessors() - 7, 7168): (16, 20),
    (80 * _cuda.multiprocessors() + 5, 1024): (1, 16),
}
BOXED_NF4 = list(MANY_NF4)[:2]


def columns(block_format, least=0):
    """Widths whose rows lie on 16-byte boundaries, and not: the two ways weights are loaded."""
    sizes = [n * block_format.block_size for n in range(1, 80)]
    aligned = [n for n in sizes if block_format.row_bytes(n) % 16 == 0 and n > 2048]
    unaligned = [n for n in sizes if block_format.row_bytes(n) % 16 and n >= least]
    return [*aligned[:1], *unaligned[:1]]


def run_on(device, plan_type, descriptor, arrays, shape, dtype):
    plan = plan_type.select(device, descriptor)
    if device == "cpu":
        output = np.empty(shape, dtype)
        lent = bcy.Workspace(plan.workspace_size, device="cpu") if plan.workspace_size else None
        arguments = arrays
    else:
        output = bcy.DeviceArray.empty(shape, dtype, device=device)
        lent = bcy.Workspace(plan.workspace_size, device=device) if plan.workspace_size else None
        arguments = [bcy.DeviceArray.from_host(array, device=device) for array in arrays]
    if len(arguments) == 1:
        plan.run(*arguments, output)
    else:
        plan.run(*arguments, output, workspace=lent)
    return output if device == "cpu" else output.to_host()


def products(sizes, m, kind, x):
    descriptor = bcy.GgufMmvqMultiMDescriptor(**sizes, m=m, activation=kind, output=kind)
    yield bcy.GgufMmvqMultiMPlan, descriptor, [x], kind
    # It takes eight tokens at a time: more are nothing else, and take long.
    if m < 40:
        descriptor = bcy.GgufMmvqDescriptor(**sizes, m=m, activation=kind, output=kind)
        yield bcy.GgufMmvqPlan, descriptor, [x], kind


def problems_of(block_format, nrows, ncols, tokens, kinds, rng):
    sizes = {"nrows": nrows, "ncols": ncols, "block_format": block_format}
    for kind in kinds:
        descriptor = bcy.GgufDequantizeDescriptor(**sizes, output=kind)
        yield bcy.GgufDequantizePlan, descriptor, [], kind
        for m in tokens:
            x = rng.standard_normal((m, ncols), np.float32).astype(kind)
            yield from products(sizes, m, kind, x)


def nf4_weights(rng):
    """Values and weights for every kernel: rows streamed or not, with their scales or without, both
    layouts, nested absmax."""
    for nrows, ncols, block_size in (
        (NROWS, 2368, 64),
        (NROWS, 3072, 64),
        (NROWS, 320, 32),
        (NROWS, 99, 64),
        *((*shape, 64) for shape in MANY_NF4),
    ):
        few = rng.standard_normal((NROWS, ncols), np.float32)
        x = np.resize(few, (nrows, ncols))
        yield x, bcy.quantize(x, "nf4", block_size=block_size)
        if nrows == NROWS or ncols % 1024 == 0:
            yield x, bcy.quantize(x, "fp4", block_size=block_size, nested=True)
        if nrows == NROWS:
            yield x[:-1], bcy.quantize(x[:-1], "nf4", block_size=block_size).to_layout("row_pair")


def nf4_product(w, x, output, preference, lend=False):
    """The product on the device that holds the weight, as a NumPy array; `lend`: a workspace."""
    plan = w.plan(m=len(x), activation=x.dtype, output=output, preference=preference)
    if w.device == "cpu":
        y = np.empty((len(x), w.nrows), output)
        plan.run(w, x, y)
        return y
    y = bcy.DeviceArray.empty((len(x), w.nrows), output, device=w.device)
    lent = bcy.Workspace(plan.workspace_size, device=w.device) if lend else None
    plan.run(w, bcy.DeviceArray.from_host(x, device=w.device), y, workspace=lent)
    return y.to_host()


def nf4_cases(rng):
    exact = bcy.PlanPreference(bit_stable_across_hardware=True)
    cases = 0
    for values, w in nf4_weights(rng):
        there = w.to("cuda")
        pairs = [
            (bcy.dequantize(w, kind), bcy.dequantize(there, kind).to_host())
            for kind in ("float32", "float16")
        ]
        if w.layout is bcy.Nf4Layout.BITSANDBYTES:
            packed = bcy.quantize(
                bcy.DeviceArray.from_host(values),
                w.codebook.name,
                block_size=w.block_size,
                nested=w.nested is not None,
            ).to("cpu")
            pairs.append((np.asarray(w.data).ravel(), np.asarray(packed.data).ravel()))
            pairs.append((np.asarray(w.absmax).ravel(), np.asarray(packed.absmax).ravel()))
        kinds, tokens = ("float32", "float16"), (1, 5, 13, 33)
        boxed = (w.nrows, w.ncols) in BOXED_NF4
        if (w.nrows, w.ncols) in MANY_NF4:
            kinds, tokens = ("float16",), MANY_NF4[w.nrows, w.ncols]
        for kind in kinds:
            for m in tokens:
                x = rng.standard_normal((m, w.ncols), np.float32).astype(kind)
                here = nf4_product(w, x, "float32", None)
                pairs.append((here, nf4_product(there, x, "float32", exact)))
                if there.plan(m, x.dtype, "float32", exact).workspace_size:
                    pairs.append((here, nf4_product(there, x, "float32", exact, lend=True)))
                default = nf4_product(there, x, "float32", None)
                error = np.linalg.norm(default - here) / np.linalg.norm(here)
                if not error < 1e-5:
                    sys.exit(f"{w!r}, m={m}, {kind}: relative error {error}")
                plan = there.plan(m, x.dtype, "float32")
                if plan.sku.arch == 90 and boxed and not plan.workspace_size:
                    sys.exit(f"{w!r}, m={m}: too few weights for the kernel that is meant")
                if plan.workspace_size:
                    pairs.append((default, nf4_product(there, x, "float32", None, lend=True)))
                cases += 1
        for one, other in pairs:
            if one.tobytes() != other.tobytes():
                sys.exit(f"{w!r}: the GPU's bits are not the CPU's, or those without a workspace")
            cases += 1
    return cases


def check_many_tokens():
    for name, m, nrows, ncols in MANY_TOKENS:
        sizes = []
        for n in (nrows, 16):
            descriptor = bcy.GgufMmvqMultiMDescriptor(
                nrows=n, ncols=ncols, block_format=name, m=m, activation="float16"
            )
            plan = bcy.GgufMmvqMultiMPlan.select("cuda", descriptor)
            sizes.append(plan.workspace_size)
        # As many tokens are staged as are multiplied at a time: of 9 to 16 no more than otherwise.
        if plan.sku.arch == 90 and m > 16 and sizes[0] == sizes[1]:
            sys.exit(f"{name}, m={m}: not the kernel that is meant")


def main():
    check_many_tokens()
    rng = np.random.default_rng(0)
    cases = nf4_cases(rng)
    for block_format in bcy.GgufBlockFormat:
        shapes = [
            (NROWS, ncols, (1, 5, 13, 33), ("float32", "float16"))
            for ncols in columns(block_format)
        ]
        wide = next(k for k in (256, 512, 1024, 2048) if block_format.row_bytes(k) % 16 == 0)
        shapes.append((MANY_ROWS, wide, (1, 2, 8, 16, 40), ("float16",)))
        if off := columns(block_format, least=2049)[1:]:
            shapes.append((SOME_ROWS, *off, (16, 40), ("float16",)))
        if block_format.name in OTHER_TILES:
            nrows, m = OTHER_TILES[block_format.name]
            shapes.append((nrows, wide, (m,), ("float16",)))
        for name, m, nrows, ncols in MANY_TOKENS:
            if name == block_format.name:
                shapes.append((nrows, ncols, (m,), ("float16",)))
        for nrows, ncols, tokens, kinds in shapes:
            few = rng.standard_normal((NROWS, ncols), np.float32)
            packed = np.asarray(bcy.quantize(few, block_format).data).reshape(NROWS, -1)
            weight = np.resize(packed, (nrows, packed.shape[1])).reshape(-1)
            for plan_type, descriptor, activations, kind in problems_of(
                block_format, nrows, ncols, tokens, kinds, rng
            ):
                shape = (activations[0].shape[0], nrows) if activations else (nrows, ncols)
                results = [
                    run_on(device, plan_type, descriptor, [weight, *activations], shape, kind)
                    for device in ("cpu", "cuda")
                ]
                if results[0].tobytes() != results[1].tobytes():
                    sys.exit(f"{descriptor}: the GPU's bits are not the CPU's")
                cases += 1
    print(f"{cases} cases, bits equal on both backends")


if __name__ == "__main__":
    main()
