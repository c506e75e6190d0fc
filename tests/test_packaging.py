# SPDX-License-Identifier: Apache-2.0
"""What an installed package promises whoever installs it, and what the build does to keep that."""

import ast
import importlib
import importlib.metadata
import json
import os
import re
import runpy
import shutil
import subprocess
import time
from pathlib import Path

import problems
import pytest

import baracuda_cy

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "baracuda_cy"
INSTALLED = Path(baracuda_cy.__file__).parent
EXTENSIONS = sorted(path.stem for path in SOURCE.glob("*.pyx"))
FRAMEWORKS = {"torch", "jax", "jaxlib", "cupy", "tensorflow", "gguf", "ml_dtypes", "safetensors"}


def binary(name):
    (path,) = INSTALLED.glob(f"{name}.*so")
    return path


# ---- the package ---------------------------------------------------------------------------------


def test_one_version():
    assert importlib.metadata.version("baracuda-cy") == baracuda_cy.__version__
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == baracuda_cy.__version__


def test_import_loads_no_framework():
    loaded = problems.child("import sys, baracuda_cy; print(*sys.modules)").split()
    assert FRAMEWORKS.isdisjoint(name.partition(".")[0] for name in loaded)


def test_all_names_exist_and_are_sorted():
    """Constants, classes, functions; each once."""
    names = set(baracuda_cy.__all__)
    order = sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    assert baracuda_cy.__all__ == order
    for name in baracuda_cy.__all__:
        assert hasattr(baracuda_cy, name), name


def test_without_a_device_the_cpu_works_and_cuda_says_why():
    said = problems.child(
        """
        import json, numpy as np, baracuda_cy as bcy
        from baracuda_cy import _cuda
        weight = bcy.quantize(np.ones((2, 32), np.float32), "Q8_0")
        product = bcy.linear(np.ones((1, 32), np.float32), weight).tolist()
        try:
            bcy.DeviceBuffer(16)
        except bcy.BaracudaError as error:
            message = str(error)
        print(json.dumps([product, _cuda.why_unavailable(), message]))
        """,
        CUDA_VISIBLE_DEVICES="",
    )
    product, reason, message = json.loads(said)
    assert product == [[pytest.approx(32, rel=1e-2)] * 2]
    assert reason
    assert message


@pytest.mark.parametrize("name", EXTENSIONS)
def test_extension_is_abi3_and_typed(name):
    assert binary(name).name == f"{name}.abi3.so"
    assert (INSTALLED / f"{name}.pyi").exists()
    assert (INSTALLED / f"{name}.pxd").exists()


def test_package_is_marked_as_typed():
    assert (INSTALLED / "py.typed").exists()


def stub_names(body):
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign):
            yield node.target.id
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets)


@pytest.mark.parametrize("name", EXTENSIONS)
def test_stub_names_what_the_module_has(name):
    module = importlib.import_module(f"baracuda_cy.{name}")
    stub = ast.parse((SOURCE / f"{name}.pyi").read_text()).body
    declared = {item for item in stub_names(stub) if not item.startswith("_")}
    assert {item for item in declared if not hasattr(module, item)} == set()
    public = {
        item
        for item in baracuda_cy.__all__
        if getattr(getattr(baracuda_cy, item), "__module__", None) == module.__name__
    }
    assert public - declared == set()
    for node in stub:
        if isinstance(node, ast.ClassDef) and node.name in declared:
            kind = getattr(module, node.name)
            # Python shows the buffer protocol by these names from 3.12 on.
            declared_here = set(stub_names(node.body)) - {"__buffer__", "__release_buffer__"}
            assert {item for item in declared_here if not hasattr(kind, item)} == set()
            public_here = {item for item in vars(kind) if not item.startswith("_")}
            assert public_here - declared_here == set()


def binutils(tool, *arguments):
    if not shutil.which(tool):
        pytest.skip(f"{tool} of binutils is not installed")
    return subprocess.run(
        [tool, *arguments], capture_output=True, text=True, check=True
    ).stdout.splitlines()


@pytest.mark.parametrize("name", EXTENSIONS)
def test_only_the_module_is_exported(name):
    symbols = binutils("nm", "--dynamic", "--defined-only", str(binary(name)))
    assert [line.split()[-1] for line in symbols] == [f"PyInit_{name}"]


@pytest.mark.parametrize("name", EXTENSIONS)
def test_needs_no_cuda_and_no_openmp_library(name):
    needed = " ".join(
        line for line in binutils("readelf", "-d", str(binary(name))) if "(NEEDED)" in line
    )
    assert "libc.so" in needed
    assert not re.search(r"libcuda|libcudart|libnv|libgomp|libomp|libpython", needed)


# ---- the build -----------------------------------------------------------------------------------


@pytest.fixture
def build(monkeypatch):
    """The names of setup.py, with none of the caller's toolkits in sight."""
    ours = ("BARACUDA_CUDA", "BARACUDA_CUDA_ARCHS", "MAX_JOBS")
    for variable in ("CUDA_HOME", "CUDA_PATH", *ours):
        monkeypatch.delenv(variable, raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))


def fake_toolkit(root, version="13.0", without=None):
    """A toolkit in the layout of the PyPI wheels: lib, not lib64."""
    files = [
        "nvvm/bin/cicc",
        "include/cuda_runtime.h",
        "include/nv/target",
        "lib/libcudart_static.a",
    ]
    for name in files:
        if name != without:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
    nvcc = root / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        f"--version) echo 'Cuda compilation tools, release {version}, V{version}.88';;\n"
        f"--dryrun) echo '#$ TOP={root}/bin/..' >&2;;\n"
        "--list-gpu-arch) printf 'compute_80\\ncompute_90\\n';;\n"
        "esac\n"
    )
    nvcc.chmod(0o755)
    return nvcc


def test_toolkit_is_where_nvcc_says(build, tmp_path, monkeypatch):
    nvcc = fake_toolkit(tmp_path / "toolkit")
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:/usr/bin:/bin")
    toolkit, refused = build["find_toolkit"]()
    assert toolkit == (
        str(wrapper),
        (13, 0),
        tmp_path / "toolkit" / "include",
        tmp_path / "toolkit" / "lib",
    )
    assert refused == []


@pytest.mark.parametrize(
    "missing",
    ["nvvm/bin/cicc", "include/cuda_runtime.h", "include/nv/target", "lib/libcudart_static.a"],
)
def test_incomplete_toolkit_is_passed_over(build, tmp_path, monkeypatch, missing):
    fake_toolkit(tmp_path / "broken", without=missing)
    good = fake_toolkit(tmp_path / "good")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "broken"))
    monkeypatch.setenv("PATH", f"{good.parent}:/usr/bin:/bin")
    toolkit, (reason,) = build["find_toolkit"]()
    assert toolkit.nvcc == str(good)
    assert "$CUDA_HOME" in reason
    assert (
        f"has no {missing.removeprefix('nvvm/bin/').removeprefix('include/').removeprefix('lib/')}"
        in reason
    )


def test_old_toolkit_is_passed_over(build, tmp_path, monkeypatch):
    fake_toolkit(tmp_path / "old", version="12.6")
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "old"))
    refused = build["find_toolkit"]()[1]
    assert refused[0].endswith("is CUDA 12.6; 12.8 or later is needed")


@pytest.mark.parametrize(
    ("asked", "archs"),
    [
        ("80", ["80"]),
        ("80;90;90-virtual", ["80", "90", "90-virtual"]),
        ("90, 80 90", ["90", "80"]),
        ("90a", ["90a"]),
    ],
)
def test_architecture_list(build, tmp_path, monkeypatch, asked, archs):
    monkeypatch.setenv("BARACUDA_CUDA_ARCHS", asked)
    assert build["cuda_archs"](str(fake_toolkit(tmp_path))) == archs


@pytest.mark.parametrize("asked", ["70", "sm_90", "90-real", "90;;x", "everything"])
def test_unknown_architecture_is_named(build, tmp_path, monkeypatch, asked):
    monkeypatch.setenv("BARACUDA_CUDA_ARCHS", asked)
    with pytest.raises(SystemExit, match=r"BARACUDA_CUDA_ARCHS: expected .*80 90.* got '"):
        build["cuda_archs"](str(fake_toolkit(tmp_path)))


def test_native_without_a_gpu_is_refused(build, tmp_path, monkeypatch):
    monkeypatch.setenv("BARACUDA_CUDA_ARCHS", "native")
    nvcc = fake_toolkit(tmp_path)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(SystemExit, match="nvidia-smi shows no GPU"):
        build["cuda_archs"](str(nvcc))


def fake_gpus(folder, monkeypatch, *capabilities):
    """A machine with these GPUs, as nvidia-smi lists them."""
    smi = folder / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\nprintf '%s\\n' {' '.join(capabilities)}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize("asked", ["native", ""])  # what a machine has is also its default
@pytest.mark.parametrize(
    ("gpus", "archs", "said"),
    [
        (["9.0", "8.0", "9.0"], ["80", "90"], ""),
        (["6.1", "9.0"], ["90"], "compute capability 6.1: left out, since the kernels need 7.5"),
        (["7.5", "8.0"], ["80"], "compute capability 7.5: left out, since nvcc does not know it"),
        (["8.0", "12.1"], ["80", "90-virtual"], "12.1: nvcc does not know it, so that it gets PTX"),
        (["8.6"], ["80-virtual"], "8.6: nvcc does not know it, so that it gets PTX of 80"),
    ],
)
def test_gpus_of_the_machine(build, tmp_path, monkeypatch, capsys, asked, gpus, archs, said):
    nvcc = fake_toolkit(tmp_path)
    fake_gpus(nvcc.parent, monkeypatch, *gpus)
    monkeypatch.setenv("BARACUDA_CUDA_ARCHS", asked)
    assert build["cuda_archs"](str(nvcc)) == archs
    printed = capsys.readouterr().out
    assert said in printed
    assert bool(said) == bool(printed)


def test_gpu_that_is_too_old(build, tmp_path, monkeypatch, capsys):
    nvcc = fake_toolkit(tmp_path)
    fake_gpus(nvcc.parent, monkeypatch, "6.1")
    assert build["cuda_archs"](str(nvcc)) == ["80", "90", "90-virtual"]
    assert "6.1: left out" in capsys.readouterr().out
    monkeypatch.setenv("BARACUDA_CUDA_ARCHS", "native")
    with pytest.raises(SystemExit, match="shows no GPU here that can be built for"):
        build["cuda_archs"](str(nvcc))


@pytest.mark.parametrize(
    ("asked", "with_cuda", "emulated"),
    [
        ("", True, False),
        ("1", True, False),
        ("On", True, False),
        ("0", False, False),
        (" off ", False, False),
        ("emulated", False, True),
    ],
)
def test_which_backends_are_built(monkeypatch, asked, with_cuda, emulated):
    monkeypatch.setenv("BARACUDA_CUDA", asked)
    names = runpy.run_path(str(ROOT / "setup.py"))
    assert (names["WITH_CUDA"], names["EMULATED"]) == (with_cuda, emulated)


@pytest.mark.parametrize("asked", ["2", "cpu", "emulate", "12.8"])
def test_unknown_backend_ends_the_build(monkeypatch, asked):
    monkeypatch.setenv("BARACUDA_CUDA", asked)
    with pytest.raises(SystemExit, match=f"BARACUDA_CUDA: expected 1 .* got '{asked}'"):
        runpy.run_path(str(ROOT / "setup.py"))


def test_jobs(build, monkeypatch):
    assert build["jobs"]() == len(os.sched_getaffinity(0))
    monkeypatch.setenv("MAX_JOBS", " 3 ")
    assert build["jobs"]() == 3


@pytest.mark.parametrize("asked", ["0", "-1", "many", "1.5"])
def test_unknown_jobs_end_the_build(build, monkeypatch, asked):
    monkeypatch.setenv("MAX_JOBS", asked)
    with pytest.raises(SystemExit, match=f"MAX_JOBS: expected how many .* got '{asked}'"):
        build["jobs"]()


def test_gencode_of_real_and_virtual(build):
    assert build["gencode"]("80") == "-gencode=arch=compute_80,code=sm_80"
    assert build["gencode"]("90") == "-gencode=arch=compute_90a,code=sm_90a"
    assert build["gencode"]("90-virtual") == "-gencode=arch=compute_90,code=compute_90"
    assert build["gencode"]("120-virtual") == "-gencode=arch=compute_120,code=compute_120"


def test_object_is_rebuilt_when_what_it_read_changes(build, tmp_path, monkeypatch):
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    monkeypatch.chdir(tmp_path)
    source, header, output = Path("a.cpp"), Path("a.h"), Path("out/a.cpp.o")
    source.write_text('#include "a.h"\n#include <cstdint>\n')
    header.write_text("extern int a;\n")
    command = ["g++", "-c", str(source), "-o", str(output)]
    item = build["Object"](source, command, "recipe", output)
    assert item.stale()
    item.compile()
    made = time.time() - 10
    for path in (source, header):
        os.utime(path, (made, made))
    assert not item.stale()
    assert item._replace(recipe="another").stale()
    os.utime(header, (made + 60, made + 60))
    assert item.stale()
    item.compile()
    header.unlink()
    assert item.stale()


# ---- the tree ------------------------------------------------------------------------------------


def tree(*suffixes):
    folders = ("src", "tests", "benchmarks", "examples", "docs", ".github", ".ci")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file()]
    return [path for path in files if path.suffix in suffixes]


def test_sources_name_their_licence():
    sources = tree(".py", ".pyi", ".pyx", ".pxd", ".cu", ".cuh", ".cpp", ".h", ".def", ".yml")
    assert len(sources) > 20
    for path in sources:
        head = path.read_text().splitlines()[:2]
        assert any("SPDX-License-Identifier: Apache-2.0" in line for line in head), path


def test_actions_are_pinned_by_commit():
    if not (ROOT / ".github").is_dir():
        pytest.skip("a source distribution has no workflows")
    used = [
        (path.name, line.strip())
        for path in tree(".yml")
        if path.parent.name == "workflows"
        for line in path.read_text().splitlines()
        if "uses:" in line and "uses: ./" not in line  # a workflow of this commit
    ]
    assert used
    for where in used:
        assert re.search(r"uses: [\w./-]+@[0-9a-f]{40} # v\d", where[1]), where
