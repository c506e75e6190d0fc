# SPDX-License-Identifier: Apache-2.0
"""Every example of the docstrings runs, and the page of the API names what is public."""

import doctest
import importlib
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

import baracuda_cy as bcy

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {
    ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__"): text
    for path in sorted((ROOT / "src").rglob("*.py*"))
    if path.suffix in (".py", ".pyx") and ">>> " in (text := path.read_text())
}


def docstrings(name, names=None):
    """The examples of a module, by docstring: as many as its source has."""
    module = importlib.import_module(name)
    found = doctest.DocTestFinder(exclude_empty=True).find(module, globs=names or {}, module=module)
    # Cython lists some docstrings again.
    found = [test for test in found if ".__test__." not in test.name]
    assert sum(len(test.examples) for test in found) == SOURCES[name].count(">>> ")
    return found


def failing(tests):
    runner = doctest.DocTestRunner()
    return [test.name for test in tests if runner.run(test).failed]


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """The examples' files, where they look for them; without the gguf package, not its own."""
    monkeypatch.chdir(tmp_path)
    weight = bcy.quantize(np.eye(64, dtype=np.float32), "nf4")
    folder = tmp_path / "llama-bnb-4bit"
    folder.mkdir()
    bcy.save_bitsandbytes(
        folder / "model.safetensors", {"model.layers.0.mlp.up_proj.weight": weight}
    )
    if not importlib.util.find_spec("gguf"):
        return
    import gguf

    writer = gguf.GGUFWriter("model.gguf", "test")
    packed = np.asarray(bcy.quantize(np.eye(64, dtype=np.float32), "Q8_0").data)
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("blk.0.ffn_up.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def need_package_of(name):
    package = name.rpartition(".")[2]
    if package in ("gguf", "torch", "jax") and name != "baracuda_cy.gguf":
        pytest.importorskip(package, reason=f"the {package} package is not installed")


@pytest.mark.parametrize("name", SOURCES)
def test_examples(name):
    """All but those that need a GPU, which is what +SKIP says."""
    need_package_of(name)
    tests = docstrings(name)
    assert not all(doctest.SKIP in item.options for test in tests for item in test.examples)
    assert failing(tests) == []


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in SOURCES if "+SKIP" in SOURCES[name]])
def test_examples_that_need_a_gpu(name):
    need_package_of(name)
    weight = bcy.quantize(np.eye(64, dtype=np.float32), "Q8_0").to("cuda")
    plan = weight.plan(m=1)
    taken_for_granted = {
        "plan": plan,
        "weight": weight,
        "x": bcy.DeviceArray.empty((1, 64), "float32"),
        "y": bcy.DeviceArray.empty((1, 64), "float32"),
        "workspace": bcy.Workspace(plan.workspace_size),
    }
    tests = docstrings(name, taken_for_granted)
    for test in tests:
        for item in test.examples:
            item.options.pop(doctest.SKIP, None)
    assert failing(tests) == []


# ---- the page of the API -------------------------------------------------------------------------


def test_the_page_of_the_api_names_what_is_public():
    page = (ROOT / "docs" / "api.md").read_text()
    named = re.findall(r"^::: baracuda_cy\.(\w+)$", page, re.MULTILINE)
    named.remove("errors")  # a module, with all it has
    named += [name for name in vars(bcy.errors) if isinstance(getattr(bcy.errors, name), type)]
    assert sorted([*named, "__version__"]) == sorted(bcy.__all__)
