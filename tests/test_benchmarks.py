# SPDX-License-Identifier: Apache-2.0
"""The benchmarks measure what they say and write what they promise. Nothing here judges a time."""

import copy
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


harness, native, render = load("harness"), load("native"), load("render")
bench_gguf, bench_call = load("bench_gguf"), load("bench_call")

MACHINE = {
    "system": "Linux",
    "python": "3.11.0",
    "cpu": "a CPU",
    "cpus": 2,
    "packages": {"numpy": "2.0"},
    "commit": "abc",
    "gpu": {"name": "NVIDIA H100 80GB HBM3", "driver": "580", "sm_clock_mhz": "1980"},
}


def gpu_document():
    result = harness.document("gguf", {"quick": False}, copy.deepcopy(MACHINE))
    result["ceilings"] = {"read_gb_s": 3190.0, "copy_gb_s": 2996.0, "empty_node_us": 0.89}
    for kind, us, m in (("product", 5.0, 1), ("call", 6.0, 1), ("call", 7.0, 8)):
        result["cells"].append(
            {
                "device": "cuda",
                "kind": kind,
                "format": "Q4_K",
                "nrows": 4096,
                "ncols": 4096,
                "m": m,
                "us": us,
                "us_lowest": us,
                "gb_s": 1887.4,
                "error": 0.005,
                "percent_of_read": 87.4,
                "dense_us": 15.5,
                "dense_ratio": 15.5 / us,
            }
        )
    return result


def lines(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def test_document_survives_the_disk(tmp_path):
    path = tmp_path / "folder" / "result.json"
    harness.save(gpu_document(), path)
    assert harness.load(path) == gpu_document()
    assert sum("Q4_K" in line for line in path.read_text().splitlines()) == 3


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


def test_gpu_tables():
    text = render.tables(gpu_document())
    assert "NVIDIA H100 80GB HBM3" in text
    assert "3190 GB/s read" in text
    assert "| Q4_K | 5.0 (1887, 87 %) |" in text
    assert "| Q4_K | 6.0 (2.58x) | 7.0 (2.21x) |" in text
    assert "| torch float16 | 15.5 | 15.5 |" in text
    recorded = json.loads((BENCHMARKS / "peers" / "ggml-h100.json").read_text())
    (theirs,) = [
        c["us"]
        for c in recorded["cells"]
        if (c["format"], c["nrows"], c["ncols"], c["m"]) == ("Q4_K", 4096, 4096, 8)
    ]
    assert f"{theirs:.1f} ({theirs / 7:.2f})" in text


def test_peers_of_another_gpu_are_left_out():
    result = gpu_document()
    result["machine"]["gpu"]["name"] = "NVIDIA H200"
    assert "ggml" not in render.tables(result)


def test_table_leaves_missing_cells_empty():
    text = render.table("T", {("a", 1): "x", ("b", 2): "y"}, "c", lambda column: str(column[0]))
    assert lines(text) == ["| c | 1 | 2 |", "| :-- | --: | --: |", "| a | x |  |", "| b |  | y |"]


def test_page_is_rendered_in_place(tmp_path):
    harness.save(gpu_document(), tmp_path / "h100.json")
    page = "before\n<!-- benchmark: h100.json -->\nstale\n<!-- end benchmark -->\nafter\n"
    fresh = render.update(page, tmp_path)
    assert "stale" not in fresh
    assert "3190 GB/s" in fresh
    assert fresh.startswith("before\n<!-- benchmark: h100.json -->\n")
    assert fresh.endswith("<!-- end benchmark -->\nafter\n")
    assert render.update(fresh, tmp_path) == fresh


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_pages_show_the_recorded_documents(page):
    text = (ROOT / page).read_text()
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


def test_arguments_are_those_of_the_c_interface():
    header = (ROOT / "src/cuda/include/baracuda/api.h").read_text()
    body = re.search(r"typedef struct bcy_gguf_matmul_args \{(.*?)\}", header, re.DOTALL)[1]
    fields = re.findall(r"^\s*([\w ]+?[ *]+)(\w+);", body, re.MULTILINE)
    names = {"int64_t": "c_long", "int32_t": "c_int"}
    expected = [(name, "c_void_p" if "*" in kind else names[kind.strip()]) for kind, name in fields]
    ours = [(name, kind.__name__) for name, kind in native.MatmulArgs._fields_]
    assert ours == expected


def test_native_functions_give_the_plan_s_bits():
    rng = np.random.default_rng(0)
    w = bcy.quantize(rng.standard_normal((40, 256), dtype=np.float32), "Q5_K")
    x = rng.standard_normal((3, 256), dtype=np.float32)
    y = np.zeros((3, 40), np.float32)
    workspace = bcy.Workspace(w.plan(m=3).workspace_size, device="cpu")
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
    functions = native.Native("cpu")
    functions.stage(native.address(arguments), 1)
    functions.matmul(native.address(arguments), 1)
    np.testing.assert_array_equal(y, bcy.linear(x, w))


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
    times = bench_gguf.Times(1e-3, 1e-3)
    with pytest.raises(SystemExit, match=r"Q8_0 40x256 M=2 call: relative error"):
        bench_gguf.cell("cpu", "call", weights, 40, 2, times, weights.error(right, x, 2))
    with pytest.raises(SystemExit, match="relative error nan"):
        bench_gguf.cell("cpu", "call", weights, 40, 2, times, float("nan"))


def test_copies_exceed_the_cache():
    assert bench_gguf.copies_for(10, 95) == 10
    assert bench_gguf.copies_for(1000, 95) == 2


def test_gguf_benchmark_runs(tmp_path, capsys):
    path = tmp_path / "cpu.json"
    arguments = "--device cpu --quick --formats Q4_0 Q4_K --shapes 48x256 --m 1 3 --threads 1 2"
    bench_gguf.main([*arguments.split(), "--rotate", "1", "--output", str(path)])
    result = harness.load(path)
    cells = {(c["format"], c["m"], c["threads"], c["kind"]) for c in result["cells"]}
    assert cells == set(itertools.product(["Q4_0", "Q4_K"], [1, 3], [1, 2], ["call", "product"]))
    assert all(0 < c["error"] < bench_gguf.ERROR_LIMIT for c in result["cells"])
    assert "| Q4_K | " in capsys.readouterr().out


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
    render.plot(gpu_document(), str(path))
    assert "<svg" in path.read_text()
