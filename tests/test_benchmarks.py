# SPDX-License-Identifier: Apache-2.0
"""The benchmarks measure what they say and write what they promise. Nothing here judges a time."""

import argparse
import copy
import ctypes
import importlib
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import baracuda_cy as bcy

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


def load(name):
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


harness, native, render, targets = map(load, ("harness", "native", "render", "targets"))
gpu = load("gpu")
bench_gguf, bench_nf4, bench_call = map(load, ("bench_gguf", "bench_nf4", "bench_call"))

MACHINE = {
    "system": "Linux",
    "python": "3.11.0",
    "cpu": "a CPU",
    "cpus": 2,
    "packages": {"numpy": "2.0"},
    "commit": "abc",
    "gpu": {"name": "NVIDIA H100 80GB HBM3", "driver": "580", "sm_clock_mhz": "1980"},
}


def gpu_cell(kind, us, m, **more):
    return {
        "device": "cuda",
        "kind": kind,
        "format": "Q4_K",
        "nrows": 4096,
        "ncols": 4096,
        "m": m,
        "bytes": 9437184,
        "us": us,
        "us_lowest": us,
        "gb_s": 1887.4,
        "error": 0.005,
        **more,
    }


def beside_read(overlap, us, percent):
    return {"overlap": overlap, "read_us": us * percent / 100, "percent_of_read": percent}


def gpu_document():
    result = harness.document("gguf", {"quick": False}, copy.deepcopy(MACHINE))
    result["ceilings"] = {
        "bytes": 1 << 30,
        "read_gb_s": 3190.0,
        "read_overlap_gb_s": 3200.0,
        "copy_gb_s": 2996.0,
        "empty_us": 0.89,
        "empty_overlap_us": 0.61,
    }
    result["cells"] = [
        gpu_cell("product", 4.0, 1, **beside_read(True, 4.0, 75.0)),
        gpu_cell("product", 6.0, 1, **beside_read(False, 6.0, 73.0)),
        gpu_cell("call", 5.0, 1, **beside_read(True, 5.0, 60.0), dense_us=15.5, dense_ratio=3.1),
        gpu_cell("call", 7.0, 1, **beside_read(False, 7.0, 62.0), dense_us=15.5, dense_ratio=2.21),
        gpu_cell("call", 31.0, 8, **beside_read(True, 31.0, 9.7), dense_us=15.5, dense_ratio=0.5),
        gpu_cell("float", 8.0, 1, **beside_read(True, 8.0, 37.4)),
        gpu_cell("chain", 5.5, 8, **beside_read(True, 5.5, 54.5)),
        gpu_cell("dequantize", 16.0, 0, output="bfloat16", copy_us=15.2, percent_of_copy=95.0),
    ]
    return result


def nf4_cell(name, kind, us, m, **more):
    return {
        "device": "cuda",
        "kind": kind,
        "name": name,
        "dtype": "float16",
        "nrows": 14336,
        "ncols": 4096,
        "m": m,
        "bytes": 33030144,
        "us": us,
        "us_lowest": us,
        "gb_s": 2000.0,
        "error": 0.0003,
        **more,
    }


def nf4_document():
    result = gpu_document() | {"benchmark": "nf4"}
    result["machine"]["packages"] |= {"torch": "2.11.0", "bitsandbytes": "0.50.2"}

    def ours(kind, us, m, overlap, percent, **more):
        beside = beside_read(overlap, us, percent)
        return nf4_cell("baracuda-cy", kind, us, m, **beside, **more)

    def unpacked(name, us, percent):
        return nf4_cell(name, "dequantize", us, 0, copy_us=46.0, percent_of_copy=percent)

    def theirs(kind, us, m):
        return nf4_cell("bitsandbytes", kind, us, m, **beside_read(False, us, 40.0))

    result["cells"] = [
        ours("product", 12.0, 1, True, 84.0),
        ours("product", 14.0, 1, False, 79.0),
        ours("product", 15.6, 8, True, 65.0),
        ours("product", 16.8, 8, False, 66.0),
        ours("product", 18.0, 32, True, 55.0),
        ours("exact", 18.0, 1, True, 56.0),
        ours("exact", 20.0, 1, False, 56.0),
        ours("exact", 36.0, 1, True, 28.0, dtype="float32"),
        ours("nested", 13.0, 1, True, 80.0),
        ours("nested", 15.0, 1, False, 75.0),
        unpacked("baracuda-cy", 50.0, 92.0),
        nf4_cell("baracuda-cy", "quantize", 57.0, 0, gb_s=2639.5),
        theirs("product", 30.0, 1),
        theirs("product", 15.0, 8),
        theirs("nested", 32.0, 1),
        unpacked("bitsandbytes", 69.0, 66.7),
        nf4_cell("torch", "product", 42.0, 1),
    ]
    return result


def lines(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def test_document_survives_the_disk(tmp_path):
    path = tmp_path / "folder" / "result.json"
    harness.save(gpu_document(), path)
    assert harness.load(path) == gpu_document()
    assert sum("Q4_K" in line for line in path.read_text().splitlines()) == 8
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda d: d.update(schema="other"), "schema"),
        (lambda d: d.update(benchmark="other"), "benchmark"),
        (lambda d: d.update(machine=None), "machine"),
        (lambda d: d.update(cells={}), "cells"),
        (lambda d: d["cells"][1].pop("us"), r"cells\[1\]\.us"),
        (lambda d: d["cells"][1].update(us=float("nan")), r"cells\[1\]\.us"),
        (lambda d: d["cells"][2].update(m="8"), r"cells\[2\]\.m"),
        (lambda d: d["cells"][0].update(format=None), r"cells\[0\]\.format"),
    ],
)
def test_document_is_checked(change, field):
    result = gpu_document()
    change(result)
    with pytest.raises(ValueError, match=field):
        harness.check(result)


def test_median_takes_repeats_for_the_minimum():
    calls = []

    def sample(repeats):
        calls.append(repeats)
        return repeats * 0.001 * (2 if len(calls) == 4 else 1)  # one sample is disturbed

    median, lowest, repeats = harness.times_of(sample, samples=5, minimum=0.0035)
    assert (median, lowest, repeats) == (pytest.approx(0.001), pytest.approx(0.001), 4)
    assert calls == [1, 2, 4, 4, 4, 4, 4]


def test_machine_names_this_package():
    machine = harness.machine("a-commit")
    assert machine["commit"] == "a-commit"
    assert machine["cpus"] >= 1
    assert "numpy" in machine["packages"]


def recorded(m):
    peer = json.loads((BENCHMARKS / "peers" / "ggml-h100.json").read_text())
    (us,) = [
        c["us"]
        for c in peer["cells"]
        if (c["format"], c["nrows"], c["ncols"], c["m"]) == ("Q4_K", 4096, 4096, m)
    ]
    return us


def test_gpu_tables():
    text = render.tables(gpu_document())
    assert "NVIDIA H100 80GB HBM3" in text
    assert "3190 GB/s read (3200 where kernels overlap)" in text
    assert "| Q4_K | 4.00 / 6.00 (75 / 73 %) |" in text
    assert "| Q4_K | 5.00 / 7.00 (3.10x) | 31.0 (0.50x) |" in text
    assert "| torch float16 | 15.5 | 15.5 |" in text
    assert f"{recorded(8):.1f} ({31 / recorded(8):.2f})" in text
    assert f"| ggml as recorded: geometric mean | {5 / recorded(1):.2f} |" in text
    assert "| float16 torch.matmul: highest | 0.32 (Q4_K, 4096 x 4096) | 2.00 " in text
    for line in ("8.00 (37 %)", "5.50 (54 %)", "16.0 (95 %)"):  # float, chain, dequantize
        assert f"| Q4_K | {line} |" in text


def test_figures_stand_beside_their_targets():
    result = gpu_document()
    result["cells"] += [
        gpu_cell("product", 4.0, 8, format="Q6_K", **beside_read(True, 4.0, 61.0)),
        gpu_cell("product", 9.0, 3, **beside_read(True, 9.0, 33.0)),  # an M without a target
        gpu_cell("float", 9.0, 1, nrows=14336, bytes=33030144, **beside_read(True, 9.0, 79.0)),
    ]
    found = {
        (c.target.split(":")[0], c.row, c.column): (c.wanted, c.short)
        for c in targets.checks(result, render.peers(result))
    }
    assert found == {
        ("product, 4096 x 4096", "Q4_K", "M = 1"): (76, pytest.approx(1)),
        ("product, 4096 x 4096", "Q6_K", "M = 8"): (61, pytest.approx(0)),
        ("call over ggml", "all", "M = 1"): (0.75, pytest.approx(5 / recorded(1) - 0.75)),
        ("call over ggml", "all", "M = 8"): (0.35, pytest.approx(31 / recorded(8) - 0.35)),
        ("call over ggml", "Q4_K", "M = 1"): (1, pytest.approx(5 / recorded(1) - 1)),
        ("call over ggml", "Q4_K", "M = 8"): (0.7, pytest.approx(31 / recorded(8) - 0.7)),
        ("call, 4096 x 4096", "Q4_K", "M = 1"): (1, pytest.approx(-2.1)),
        ("call, 4096 x 4096", "Q4_K", "M = 8"): (1, pytest.approx(0.5)),
        ("activations not staged, M = 1", "Q4_K", "14336 x 4096"): (80, pytest.approx(1)),
        ("unpacking to bfloat16", "Q4_K", "4096 x 4096"): (90, pytest.approx(-5)),
    }
    text = render.tables(result)
    assert "| unpacking to bfloat16: % of a copy | 1 | 1 | Q4_K, 4096 x 4096: meets |" in text
    assert "% of only reading | 2 | 1 | Q4_K, M = 1: misses by 1 |" in text
    assert "| Q4_K | 75 (misses 76 by 1) |" in text


def test_targets_cover_every_m_and_shape():
    assert {f"{n}x{k}" for n, k in targets.PRODUCT} == set(bench_gguf.SHAPES)
    rows = (*targets.PRODUCT.values(), targets.PEER_MEAN, targets.PEER_ANY, targets.LENIENCE)
    assert {len(row) for row in rows} == {len(targets.MS)}
    assert set(targets.HARDER) < set(bcy.GgufBlockFormat.__members__)


def test_nf4_tables():
    text = render.tables(nf4_document())
    products = "µs (% of only reading)\n\n| shape | M = 1 | M = 8 | M = 32 |"
    assert products in text
    assert (
        "| 14336 x 4096 | 12.0 / 14.0 (84 / 79 %) | 15.6 / 16.8 (65 / 66 %) | 18.0 (55 %) |" in text
    )
    for title, line in (
        ("overlapping / not: time over that of M = 1", "1.30 / 1.20 | 1.50"),
        ("bitsandbytes 0.50.2", "30.0 (0.40 / 0.47) | 15.0 (1.04 / 1.12)"),
        ("dense torch.matmul, torch 2.11.0", "42.0 (0.29 / 0.33)"),
        ("every GPU and the CPU, overlapping / not: µs", "18.0 / 20.0 | 36.0"),
        ("every GPU and the CPU: time over the default's", "1.50 / 1.43"),
        ("every GPU and the CPU: time over bitsandbytes", "0.60 / 0.67"),
        ("nested absmax, overlapping / not: µs", "13.0 / 15.0"),
        ("nested absmax: time over the default's", "1.08 / 1.07"),
        ("nested absmax: time over bitsandbytes", "0.41 / 0.47"),
        ("Unpacking the weight", "50.0 (92 %) | 69.0 (67 %)"),
        ("Packing a weight", "57.0 (2640)"),
    ):
        (block,) = (block for block in text.split("#### ")[1:] if title in block.split("\n")[0])
        assert f"| 14336 x 4096 | {line} |" in block
    assert "ggml" not in text


def test_nf4_figures_stand_beside_their_targets():
    result = nf4_document()
    found = {
        (c.target, c.column): (c.wanted, pytest.approx(c.short)) for c in targets.checks(result, ())
    }
    over, several = "time over bitsandbytes", "time over that of M = 1"
    ways = "M = 1, overlapping", "M = 1, not overlapping"
    assert found == {
        ("product of one token: % of only reading", ways[0]): (80, -4),
        ("product of one token: % of only reading", ways[1]): (80, 1),
        (f"product, M = 2, 4, 8: {several}", "M = 8, overlapping"): (1.25, 0.05),
        (f"product, M = 2, 4, 8: {several}", "M = 8, not overlapping"): (1.25, -0.05),
        (f"product, M = 16, 32: {several}", "M = 32, overlapping"): (1.5, 0),
        (f"product: {over}", ways[0]): (1, 12 / 30 - 1),
        (f"product: {over}", ways[1]): (1, 14 / 30 - 1),
        (f"product: {over}", "M = 8, overlapping"): (1, 15.6 / 15 - 1),
        (f"product: {over}", "M = 8, not overlapping"): (1, 16.8 / 15 - 1),
        (f"exact: {over}", ways[0]): (1, 18 / 30 - 1),
        (f"exact: {over}", ways[1]): (1, 20 / 30 - 1),
        (f"nested: {over}", ways[0]): (1, 13 / 32 - 1),
        (f"nested: {over}", ways[1]): (1, 15 / 32 - 1),
        (f"dequantize: {over}", "dequantize"): (1, 50 / 69 - 1),
        ("dequantize: % of a copy", "dequantize"): (90, -2),
    }
    text = render.tables(result)
    assert "| product: time over bitsandbytes | 4 | 2 | 14336 x 4096, float16, M = 8, not " in text
    assert "| 14336 x 4096, float16 |  | 79 (misses 80 by 1) |" in text
    result["machine"]["gpu"]["name"] = "NVIDIA H200"
    assert "Targets" not in render.tables(result)


def test_nf4_summary():
    text = render.summary(nf4_document())
    assert "| float16 | 84 to 84 | 65 to 65 | 55 to 55 |" in text
    assert "| bitsandbytes: highest | 0.40 (float16, 14336 x 4096) | 1.04 (float16, " in text
    assert "| dense torch.matmul: geometric mean | 0.29 |  |" in text
    assert "| baracuda-cy | 92 to 92 |" in text
    assert "not overlapping" not in text


def test_summary_spans_the_shapes():
    result = gpu_document()
    result["cells"].append(
        gpu_cell("product", 9.0, 1, nrows=14336, bytes=33030144, **beside_read(True, 9.0, 88.0))
    )
    text = render.summary(result)
    assert "lowest to highest of 2 shapes" in text
    assert "| Q4_K, 4.5 bits | 75 to 88 |" in text
    assert "ggml as recorded: geometric mean" in text


def test_peers_and_targets_of_another_gpu_are_left_out():
    result = gpu_document()
    result["machine"]["gpu"]["name"] = "NVIDIA H200"
    text = render.tables(result)
    assert "ggml" not in text
    assert "target" not in text


def test_table_leaves_missing_cells_empty():
    text = render.table("T", {("a", 1): "x", ("b", 2): "y"}, "c", lambda column: str(column[0]))
    assert lines(text) == ["| c | 1 | 2 |", "| :-- | --: | --: |", "| a | x |  |", "| b |  | y |"]


def test_page_is_rendered_in_place(tmp_path):
    harness.save(gpu_document(), tmp_path / "h100.json")
    harness.save(nf4_document(), tmp_path / "nf4.json")
    page = "before\n<!-- benchmark: h100.json -->\nstale\n<!-- end benchmark -->\nafter\n"
    fresh = render.update(page, tmp_path)
    assert "stale" not in fresh
    assert "3190 GB/s" in fresh
    assert fresh.startswith("before\n<!-- benchmark: h100.json -->\n")
    assert fresh.endswith("<!-- end benchmark -->\nafter\n")
    assert render.update(fresh, tmp_path) == fresh
    short = render.update(page.replace(".json", ".json summary"), tmp_path)
    assert render.summary(gpu_document()) in short
    assert "3190 GB/s" not in short
    nf4 = render.update(page.replace("h100.json", "nf4.json"), tmp_path)
    assert render.tables(nf4_document()) in nf4


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_pages_show_the_recorded_documents(page):
    text = (ROOT / page).read_text()
    assert render.BLOCK.search(text)
    assert render.update(text) == text


def test_recorded_documents_are_sound():
    for path in (BENCHMARKS / "results").glob("*.json"):
        result = harness.load(path)
        assert result["cells"], path
        assert render.tables(result)
    for path in (BENCHMARKS / "peers").glob("*.json"):
        peer = json.loads(path.read_text())
        for c in peer["cells"]:
            assert c["format"] in bcy.GgufBlockFormat.__members__
            assert c["us"] > 0


@pytest.mark.parametrize(
    ("struct", "arguments"),
    [
        ("bcy_gguf_matmul_args", native.MatmulArgs),
        ("bcy_nf4_quantize_args", native.Nf4QuantizeArgs),
    ],
)
def test_arguments_are_those_of_the_c_interface(struct, arguments):
    header = (ROOT / "src/cuda/include/baracuda/api.h").read_text()
    body = re.search(rf"typedef struct {struct} \{{(.*?)\}}", header, re.DOTALL)[1]
    fields = re.findall(r"^\s*([\w ]+?[ *]+)(\w+);", body, re.MULTILINE)
    names = {"int64_t": "c_long", "int32_t": "c_int"}
    expected = [(name, "c_void_p" if "*" in kind else names[kind.strip()]) for kind, name in fields]
    ours = [(name, kind.__name__) for name, kind in arguments._fields_]
    assert ours == expected


def test_launches_are_those_of_the_driver():
    # The sizes and offsets of cuda.h.
    assert ctypes.sizeof(native.LaunchAttribute) == 72
    assert native.LaunchAttribute.value.offset == 8
    assert ctypes.sizeof(native.LaunchConfig) == 56
    seen = []

    @ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)
    def launch_kernel(config, function, pointers, extra):
        config = native.LaunchConfig.from_address(config)
        attributes = config.attributes[: config.attribute_count]
        values = (ctypes.c_void_p * 2).from_address(pointers)
        seen.append(
            (
                function,
                list(config.grid),
                list(config.block),
                config.stream,
                [(a.id, a.value[0]) for a in attributes],
                ctypes.c_void_p.from_address(values[0]).value,
                ctypes.c_int64.from_address(values[1]).value,
            )
        )
        return 0 if function == 7 else 400

    driver = object.__new__(native.Driver)
    driver.launch_kernel = launch_kernel
    arguments = ctypes.c_void_p(1 << 40), ctypes.c_int64(-5)
    driver.launch(7, 1 << 20, 256, arguments, 9, True)
    driver.launch(7, 1, 32, arguments, 9, False)
    assert seen == [
        (7, [1 << 20, 1, 1], [256, 1, 1], 9, [(6, 1)], 1 << 40, -5),
        (7, [1, 1, 1], [32, 1, 1], 9, [], 1 << 40, -5),
    ]
    with pytest.raises(RuntimeError, match="400"):
        driver.launch(8, 1, 32, arguments, 9, False)


def test_native_functions_give_the_plan_s_bits():
    rng = np.random.default_rng(0)
    w = bcy.quantize(rng.standard_normal((40, 256), dtype=np.float32), "Q5_K")
    x = rng.standard_normal((3, 256), dtype=np.float32)
    y = np.zeros((3, 40), np.float32)
    functions = native.Native("cpu")
    problem = native.MatmulArgs(nrows=40, ncols=256, m=3, format=int(w.format))
    nbytes = functions.workspace_size(native.address(problem))
    assert nbytes == w.plan(m=3).workspace_size
    workspace = bcy.Workspace(nbytes, device="cpu")
    arguments = native.MatmulArgs(
        weight=w.data.ctypes.data,
        x=x.ctypes.data,
        y=y.ctypes.data,
        workspace=workspace.ptr,
        nrows=40,
        ncols=256,
        m=3,
        x_stride=256,
        y_stride=40,
        format=int(w.format),
        x_type=native.ELEMENT["float32"],
        y_type=native.ELEMENT["float32"],
    )
    functions.stage(native.address(arguments), 1)
    functions.matmul(native.address(arguments), 1)
    np.testing.assert_array_equal(y, bcy.linear(x, w))


def test_native_quantizer_gives_the_package_s_bytes():
    x = np.random.default_rng(0).standard_normal((3, 100)).astype(np.float16)
    packed = bcy.quantize(x, "nf4")
    codes, absmax = np.zeros(150, np.uint8), np.zeros(5, np.float32)
    arguments = native.Nf4QuantizeArgs(
        x=x.ctypes.data,
        codes=codes.ctypes.data,
        absmax=absmax.ctypes.data,
        count=300,
        block_size=64,
        codebook=int(bcy.Codebook.NF4),
        x_type=native.ELEMENT["float16"],
    )
    native.Native("cpu").nf4_quantize(native.address(arguments), 1)
    np.testing.assert_array_equal(codes, np.asarray(packed.data).ravel())
    np.testing.assert_array_equal(absmax, packed.absmax)


def test_native_function_raises_what_the_package_raises():
    arguments = native.MatmulArgs(nrows=1, ncols=32, m=1, format=99, x_type=1, y_type=1)
    with pytest.raises(bcy.BaracudaError):
        native.Native("cpu").stage(native.address(arguments), 1)


def test_wrong_products_stop_the_benchmark():
    weights = bench_gguf.Weights("Q8_0", 256)
    x = np.ones((2, 256), np.float32)
    right = (x @ weights.exact[weights.rows(40, 3)].T).astype(np.float32)
    assert weights.error(right, x, 3) < 1e-6
    assert weights.error(right, x, 2) > bench_gguf.ERROR_LIMIT  # the rows of another copy
    times = harness.Times(1e-3, 1e-3)
    with pytest.raises(SystemExit, match=r"Q8_0 40x256 M=2 call: relative error"):
        bench_gguf.cell("cpu", "call", weights, 40, 2, times, weights.error(right, x, 2))
    with pytest.raises(SystemExit, match="relative error nan"):
        bench_gguf.cell("cpu", "call", weights, 40, 2, times, float("nan"))


def test_wrong_products_of_nf4_stop_the_benchmark():
    times = harness.Times(1e-3, 1e-3)
    how = "product", "baracuda-cy", "float16", (40, 256), 2, times, 100
    bench_nf4.cell("cuda", *how, 9e-4)
    with pytest.raises(SystemExit, match=r"baracuda-cy 40x256 M=2 product float16: relative error"):
        bench_nf4.cell("cuda", *how, 2e-3)
    with pytest.raises(SystemExit, match="relative error nan"):
        bench_nf4.cell("cuda", *how, float("nan"))
    theirs = "product", "bitsandbytes", *how[2:]
    bench_nf4.cell("cuda", *theirs, 2e-3)
    with pytest.raises(SystemExit, match=r"below 0\.02"):
        bench_nf4.cell("cuda", *theirs, 0.1)
    with pytest.raises(SystemExit, match="below 1e-09"):  # the codes of a half that is one step off
        bench_nf4.cell("cuda", "quantize", *how[1:], 1e-6)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("ncols", "nrows"), [(256, 300), (512, 130), (768, 77), (4096, 10)])
def test_copies_of_nf4_have_the_rows_of_the_tile(ncols, nrows, nested):
    weights = bench_nf4.Weights(ncols, nested)
    for number in (0, 1, 5):
        copied = weights.copy(nrows, number)
        assert (copied.nested is not None) == nested
        expected = weights.exact[weights.rows(nrows, number)]
        np.testing.assert_array_equal(bcy.dequantize(copied, "float32"), expected)
    x = np.ones((2, ncols), np.float32)
    copied = weights.copy(nrows, 3)
    assert weights.error(bcy.linear(x, copied), x, 3) < 1e-6
    assert weights.error(bcy.linear(x, copied), x, 2) > bench_nf4.PEER_LIMIT
    assert len(weights.copies(nrows, 3 * copied.nbytes)) == 3


def test_activations_are_rounded_to_their_type():
    values = np.random.default_rng(0).standard_normal((3, 1000), dtype=np.float32)
    halfway = np.array([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8) * (1 + 2**-23)], np.float32)
    for element, unit in (("float32", 0), ("float16", 2**-11), ("bfloat16", 2**-8)):
        kept = bench_nf4.rounded(values, element)
        assert kept.dtype == (np.float32 if element == "float32" else np.float16)
        error = np.abs(bench_nf4.read(kept, element).astype(np.float64) / values - 1).max()
        assert unit / 2 <= error <= unit
    ties = bench_nf4.read(bench_nf4.rounded(halfway, "bfloat16"), "bfloat16")
    assert ties.tolist() == [1, 1 + 2**-6, -(1 + 2**-7)]


def test_copies_exceed_the_cache():
    assert gpu.copies_for(10, 95) == 10
    assert gpu.copies_for(1000, 95) == 2


def test_graphs_are_long_enough():
    for calls in (1, 2, 31, 32, 33):
        count = calls * gpu.rounds_of([None] * calls)
        assert gpu.GRAPH_CALLS <= count < gpu.GRAPH_CALLS + calls


@pytest.mark.parametrize(("element", "bits"), [("float16", 0xC100), ("bfloat16", 0xC020)])
def test_halves_are_read(element, bits):
    assert gpu.floats(np.array([[bits]], np.uint16), element) == -2.5


def test_gguf_benchmark_runs(tmp_path, capsys):
    path = tmp_path / "cpu.json"
    arguments = "--device cpu --quick --formats Q4_0 Q4_K --shapes 48x256 --m 1 3 --threads 1 2"
    bench_gguf.main([*arguments.split(), "--rotate", "1", "--output", str(path)])
    result = harness.load(path)
    cells = {(c["format"], c["m"], c["threads"], c["kind"]) for c in result["cells"]}
    assert cells == set(itertools.product(["Q4_0", "Q4_K"], [1, 3], [1, 2], ["call", "product"]))
    assert all(0 < c["error"] < bench_gguf.ERROR_LIMIT for c in result["cells"])
    assert "| Q4_K | " in capsys.readouterr().out


@pytest.mark.parametrize(("bench", "kind"), [(bench_gguf, "chain"), (bench_nf4, "nested")])
def test_kinds_are_those_of_the_device(bench, kind, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--device", "cpu", "--kinds", kind])
    assert f"got {{'{kind}'}}" in capsys.readouterr().err


def test_nf4_benchmark_runs(tmp_path, capsys):
    path = tmp_path / "cpu.json"
    arguments = "--device cpu --quick --shapes 96x256 48x128 --m 1 3 --threads 1 2 --rotate 1"
    bench_nf4.main([*arguments.split(), "--names", "baracuda-cy", "--output", str(path)])
    result = harness.load(path)
    cells = {(c["nrows"], c["m"], c["threads"], c["kind"]) for c in result["cells"]}
    assert cells == set(itertools.product([96, 48], [1, 3], [1, 2], ["product"]))
    assert all(0 < c["error"] < bench_nf4.LIMIT["float32"] for c in result["cells"])
    printed = capsys.readouterr().out
    assert "#### 48 x 128 on the CPU" in printed
    assert "| baracuda-cy | " in printed
    with pytest.raises(SystemExit):
        bench_nf4.main(["--device", "cpu", "--shapes", "64x192"])
    assert "multiple of 128, got 64x192" in capsys.readouterr().err


def test_nf4_problems_are_those_asked_for():
    class Options:
        kinds, dtypes, m = list(bench_nf4.KINDS), list(bench_nf4.LIMIT), [1, 2, 8]

    bench = object.__new__(bench_nf4.GpuBench)
    bench.options = Options
    halves = bench_nf4.HALVES
    everywhere = {
        *itertools.product(["product"], halves, [1, 2, 8]),
        *itertools.product(["exact"], ["float16", "float32"], [1, 2, 8]),
        *itertools.product(["dequantize"], halves, [0]),
    }
    small = {*itertools.product(["nested"], ["float16"], [1, 8]), ("quantize", "float16", 0)}
    assert set(bench.problems(4096, 4096)) == everywhere | small
    assert set(bench.problems(128256, 4096)) == everywhere
    Options.dtypes, Options.m = ["float32"], [2, 8]
    asked = {("exact", "float32", 2), ("exact", "float32", 8)}
    assert set(bench.problems(4096, 4096)) == asked


@pytest.mark.gpu
def test_nf4_benchmark_runs_on_a_gpu(tmp_path):
    pytest.importorskip("cupy")
    path = tmp_path / "gpu.json"
    arguments = "--device cuda --quick --shapes 512x512 1024x512 --m 1 2 8 --rotate 4"
    bench_nf4.main([*arguments.split(), "--output", str(path)])
    result = harness.load(path)
    ours = [c for c in result["cells"] if c["name"] == "baracuda-cy"]
    assert {(c["kind"], c["dtype"], c["m"], c.get("overlap")) for c in ours} == {
        *itertools.product(["product"], bench_nf4.HALVES, [1, 2, 8], [True, False]),
        *itertools.product(["exact"], ["float16", "float32"], [1, 2, 8], [True, False]),
        *itertools.product(["nested"], ["float16"], [1, 8], [True, False]),
        *itertools.product(["dequantize"], bench_nf4.HALVES, [0], [None]),
        ("quantize", "float16", 0, None),
    }


@pytest.mark.gpu
def test_gguf_benchmark_runs_on_a_gpu(tmp_path):
    pytest.importorskip("cupy")
    path = tmp_path / "gpu.json"
    arguments = "--device cuda --quick --formats Q2_K Q8_0 --shapes 512x512 1024x512 --m 1 8"
    bench_gguf.main([*arguments.split(), "--rotate", "4", "--output", str(path)])
    result = harness.load(path)
    kinds = {(c["kind"], c.get("overlap"), c["m"], c.get("output")) for c in result["cells"]}
    assert kinds == {
        *itertools.product(["product", "call"], [True, False], [1, 8], [None]),
        ("float", True, 1, None),
        *itertools.product(["chain"], [True], [1, 8], [None]),
        *itertools.product(["dequantize"], [None], [0], ["float16", "bfloat16"]),
    }


def test_call_benchmark_runs(tmp_path, capsys):
    path = tmp_path / "call.json"
    bench_call.main(["--device", "cpu", "--quick", "--output", str(path)])
    result = harness.load(path)
    arrays = {c["array"] for c in result["cells"]}
    assert "numpy" in arrays
    for array in arrays:
        calls = {c["call"]: c["us"] for c in result["cells"] if c["array"] == array}
        assert calls["plan.run"] > 0
        assert calls["plan.run above the bare launch"] == pytest.approx(
            calls["plan.run"] - calls["the same kernels launched bare"], abs=0.01
        )
    assert "plan.run above the bare launch" in capsys.readouterr().out


def test_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "speed.svg"
    result = gpu_document()
    assert render.percents(result) == {
        "product of staged activations": {("4096 x 4096", "Q4_K", 1): 75.0},
        "whole call": {("4096 x 4096", "Q4_K", 1): 60.0, ("4096 x 4096", "Q4_K", 8): 9.7},
        "ggml as recorded, whole call": {
            ("4096 x 4096", "Q4_K", m): pytest.approx(100 * us / recorded(m))
            for m, us in ((1, 3.0), (8, 3.007))
        },
    }
    render.plot(result, str(path))
    drawn = path.read_text()
    assert "<svg" in drawn
    for text in ("4096 x 4096", "ggml as recorded, whole call", ">75<", ">60<"):
        assert text in drawn
    for empty in (result | {"cells": []}, nf4_document()):
        with pytest.raises(SystemExit, match="nothing to draw"):
            render.plot(empty, str(path))


def test_counters_of_a_profiler():
    """Each launch that was counted is the product that it should be, in the order of launches."""
    counters = load("counters")
    names = [counters.TIME, counters.INSTRUCTIONS, *counters.PERCENT.values()]
    rows = [["ID", *names], ["", *["%"] * len(names)]]
    rows += [[str(i), "2,000", "32768", *map(str, range(6))] for i in range(3)]
    text = "==PROF== connected\n" + "\n".join(
        ",".join(f'"{value}"' for value in row) for row in rows
    )
    options = argparse.Namespace(
        formats=["Q4_K"], shapes=["4096x4096"], m=[1, 8], kinds=["product", "float"]
    )
    cells = counters.counted(text, options)
    assert [(c["kind"], c["m"]) for c in cells] == [("product", 1), ("product", 8), ("float", 1)]
    assert [(c["us"], c["dram"], c["fma"], c["instructions"]) for c in cells] == [(2, 0, 5, 1)] * 3
    result = harness.document("counters", {}, MACHINE)
    result["cells"] = cells
    assert "| Q4_K | 0 / 2 / 3 / 4; 1 |" in render.tables(harness.check(result))
    with pytest.raises(SystemExit, match="counted 3 products, expected 2"):
        counters.counted(text, argparse.Namespace(**vars(options) | {"kinds": ["product"]}))
