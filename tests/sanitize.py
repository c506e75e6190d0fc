# SPDX-License-Identifier: Apache-2.0
"""Small cases of every CUDA operation and format, for compute-sanitizer: `make sanitize`.

Only this package and NumPy touch the GPU, so that what the sanitizer reports is ours. Results are
compared with the CPU backend's, bit for bit.
"""

import sys

import numpy as np

import baracuda_cy as bcy

NROWS = 19  # one whole tile of rows and a part of one
MANY_ROWS = 3 * 32 * 160 + 19  # enough for boxes of 32 rows on GPUs with up to 160 multiprocessors


def columns(block_format):
    """Widths whose rows lie on 16-byte boundaries, and not: the two ways weights are loaded."""
    sizes = [n * block_format.block_size for n in range(1, 80)]
    aligned = [n for n in sizes if block_format.row_bytes(n) % 16 == 0 and n > 2048]
    unaligned = [n for n in sizes if block_format.row_bytes(n) % 16]
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
    for plan, descriptor in (
        (bcy.GgufMmvqMultiMPlan, bcy.GgufMmvqMultiMDescriptor),
        (bcy.GgufMmvqPlan, bcy.GgufMmvqDescriptor),
    ):
        yield plan, descriptor(**sizes, m=m, activation=kind, output=kind), [x], kind


def problems_of(block_format, nrows, ncols, tokens, kinds, rng):
    sizes = {"nrows": nrows, "ncols": ncols, "block_format": block_format}
    for kind in kinds:
        descriptor = bcy.GgufDequantizeDescriptor(**sizes, output=kind)
        yield bcy.GgufDequantizePlan, descriptor, [], kind
        for m in tokens:
            x = rng.standard_normal((m, ncols), np.float32).astype(kind)
            yield from products(sizes, m, kind, x)


def main():
    rng = np.random.default_rng(0)
    cases = 0
    for block_format in bcy.GgufBlockFormat:
        shapes = [
            (NROWS, ncols, (1, 5, 13, 33), ("float32", "float16"))
            for ncols in columns(block_format)
        ]
        wide = next(k for k in (256, 512, 1024, 2048) if block_format.row_bytes(k) % 16 == 0)
        shapes.append((MANY_ROWS, wide, (1, 2, 16), ("float16",)))
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
