# SPDX-License-Identifier: Apache-2.0
"""What pyproject.toml cannot say: CUDA and C++ -> build/libbaracuda.a -> the Cython modules.

README.md says which variables it heeds, and what their values mean.
"""

import fcntl
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

BUILD = Path("build")
INCLUDE = Path("src/cuda/include")
PACKAGE = Path("src/baracuda_cy")
LINKED = {
    "baracuda_cy._cuda",
    "baracuda_cy._cpu",
}  # the other modules reach native code through these

# nvcc takes its parts unpinned, so all of them are named here; cuda_fp16.h needs the CCCL headers.
TOOLKIT_WHEELS = [
    f"nvidia-{part}==13.0.*; platform_system == 'Linux'"
    for part in ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-runtime", "cuda-cccl")
]
OLDEST_TOOLKIT = (12, 8)  # the first with sm_120 and --compress-mode
OLDEST_ARCH = 75  # the kernels multiply by its integer tensor cores
RELEASE_ARCHS = "75;80;86;89;90;100;120;120-virtual"
# Where no GPU is seen: compiled in minutes on two cores; the PTX serves later GPUs.
DEFAULT_ARCHS = "80;90;90-virtual"

# Contraction to FMA is the kernels' decision, not the compiler's: the bits depend on it.
CXX_FLAGS = [
    *("-std=c++17", "-O3", "-g0", "-DNDEBUG", "-ffp-contract=off", "-fPIC", "-pthread"),
    *(
        "-fvisibility=hidden",
        "-fvisibility-inlines-hidden",
        "-Wall",
        "-Wextra",
        "-Wno-missing-field-initializers",
    ),
]
NVCC_FLAGS = [
    *(
        "-std=c++17",
        "-O3",
        "-DNDEBUG",
        "-fmad=false",
        "-ftz=false",
        "-prec-div=true",
        "-prec-sqrt=true",
    ),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off", "--compress-mode=size"),
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# To test with: what it computes matters, and how long it takes to compile.
EMULATOR = Path("tests/emulator")
EMULATOR_FLAGS = [
    *(flag for flag in CXX_FLAGS if flag != "-O3"),
    *(
        "-O1",
        "-Wno-unknown-pragmas",
        "-Wno-unused-parameter",
        "-Wno-parentheses",
        "-Wno-sign-compare",
        "-Wno-psabi",
        "-D__CUDACC__",
        "-fsanitize=alignment",  # as on a GPU, a load or a store off its boundary ends the program
        "-fsanitize-undefined-trap-on-error",
    ),
    *(f"-I{EMULATOR}/include", f"-I{EMULATOR}"),
]
ISA_FLAGS = {  # by the end of the file's name; the caller asks the CPU before it enters such a file
    "_avx2": AVX2,
    "_avx512": [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"],
}

CUDA = os.environ.get("BARACUDA_CUDA", "").strip().lower() or "1"
EMULATED = CUDA == "emulated"
WITH_CUDA = CUDA in ("1", "on", "yes", "true")
if not (EMULATED or WITH_CUDA or CUDA in ("0", "off", "no", "false")):
    sys.exit(
        "BARACUDA_CUDA: expected 1 (the default), 0 for the CPU backend alone, or emulated; "
        f"got {os.environ['BARACUDA_CUDA']!r}"
    )
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
X86_64 = platform.machine() in ("x86_64", "AMD64")


def jobs() -> int:
    asked = os.environ.get("MAX_JOBS", "").strip()
    if not asked:
        return len(os.sched_getaffinity(0))
    if not re.fullmatch("[0-9]+", asked) or int(asked) == 0:
        sys.exit(f"MAX_JOBS: expected how many compilers may run at once, 1 or more; got {asked!r}")
    return int(asked)


def output_of(*command) -> str | None:
    """What a program prints, or None where it cannot run."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


# ---- the CUDA toolkit ----------------------------------------------------------------------------


class Toolkit(NamedTuple):
    nvcc: str
    version: tuple[int, int]
    include: Path
    library: Path


class IncompleteToolkitError(Exception):
    pass


def toolkit_candidates():
    """Where nvcc may be, best first, as (where it was found, path)."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if root := os.environ.get(variable):
            yield f"${variable}", f"{root}/bin/nvcc"
    if found := shutil.which("nvcc"):
        yield "PATH", found
    for entry in sys.path:
        for found in Path(entry).glob("nvidia/cu1?/bin/nvcc"):
            yield "the nvidia-cuda-nvcc wheel", str(found)


def probe(nvcc: str) -> Toolkit:
    version = re.search(r"release (\d+)\.(\d+)", output_of(nvcc, "--version") or "")
    if not version:
        raise IncompleteToolkitError("does not run")
    version = int(version[1]), int(version[2])
    if version < OLDEST_TOOLKIT:
        raise IncompleteToolkitError(
            "is CUDA {}.{}; {}.{} or later is needed".format(*version, *OLDEST_TOOLKIT)
        )
    # nvcc on PATH may be a wrapper far away from its toolkit: ask it where the toolkit is.
    plan = output_of(nvcc, "--dryrun", "-x", "cu", os.devnull) or ""
    top = re.search(r"^#\$ TOP=(.*)$", plan, re.MULTILINE)
    if not top:
        raise IncompleteToolkitError("does not say where its toolkit is")
    root = Path(os.path.normpath(top[1].strip()))
    places = [root, *root.glob(f"targets/{platform.machine()}-linux")]

    def first(what: str, *folders: str) -> Path:
        for folder in (place / name for place in places for name in folders):
            if (folder / what).exists():
                return folder
        raise IncompleteToolkitError(f"belongs to {root}, which has no {what}")

    first("cicc", "nvvm/bin")
    first("nv/target", "include", "include/cccl")
    return Toolkit(
        nvcc,
        version,
        first("cuda_runtime.h", "include"),
        first("libcudart_static.a", "lib64", "lib"),
    )


def find_toolkit() -> tuple[Toolkit | None, list[str]]:
    """The first complete toolkit, and why each one before it is not."""
    refused = []
    for where, nvcc in toolkit_candidates():
        try:
            return probe(nvcc), refused
        except IncompleteToolkitError as reason:
            refused.append(f"{nvcc} (from {where}) {reason}")
    return None, refused


# ---- architectures -------------------------------------------------------------------------------


def gpu_archs() -> list[str]:
    listing = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader") or ""
    return sorted(
        {f"{a}{b}" for a, b in re.findall(r"^(\d+)\.(\d)\s*$", listing, re.MULTILINE)}, key=int
    )


def archs_of_gpus(known: set[int]) -> list[str]:
    """What serves the GPUs of this machine, with a line for each that nvcc has no code for."""
    archs = []
    for gpu in map(int, gpu_archs()):
        older = [arch for arch in known if arch <= gpu]
        name = f"GPU of compute capability {gpu // 10}.{gpu % 10}"
        if gpu < OLDEST_ARCH:
            print(f"{name}: left out, since the kernels need 7.5 or later", flush=True)
        elif gpu in known or not known:
            archs.append(f"{gpu}")
        elif older:
            archs.append(f"{max(older)}-virtual")
            print(f"{name}: nvcc does not know it, so that it gets PTX of {max(older)}", flush=True)
        else:
            print(f"{name}: left out, since nvcc does not know it", flush=True)
    return archs


def cuda_archs(nvcc: str) -> list[str]:
    """BARACUDA_CUDA_ARCHS as a list such as ["80", "90", "90-virtual"]."""
    listed = re.findall(r"compute_(\d+)\b", output_of(nvcc, "--list-gpu-arch") or "")
    known = {int(number) for number in listed if int(number) >= OLDEST_ARCH}
    asked = os.environ.get("BARACUDA_CUDA_ARCHS", "").strip()
    if not asked:
        asked = ";".join(archs_of_gpus(known)) or DEFAULT_ARCHS
    elif asked == "native":
        asked = ";".join(archs_of_gpus(known))
        if not asked:
            sys.exit(
                "BARACUDA_CUDA_ARCHS=native: nvidia-smi shows no GPU here that can be built for; "
                "name the architectures, as in 80;90"
            )
    elif asked == "release":
        asked = RELEASE_ARCHS
    archs = list(dict.fromkeys(re.split(r"[;,\s]+", asked.strip("; ,"))))
    for arch in archs:
        number = re.fullmatch(r"(\d+)[af]?(-virtual)?", arch)
        if not number or (known and int(number[1]) not in known):
            sys.exit(
                f"BARACUDA_CUDA_ARCHS: expected compute capabilities that {nvcc} knows "
                f"({' '.join(map(str, sorted(known)))}), each real (90) or PTX (90-virtual), "
                f"or 'native' or 'release'; got {arch!r} in {asked!r}"
            )
    return archs


def gencode(arch: str) -> str:
    number, _, virtual = arch.partition("-")
    if arch == "90":  # no other GPU runs its machine code, which may use what is 9.0's alone
        number = "90a"
    return f"-gencode=arch=compute_{number},code={'compute' if virtual else 'sm'}_{number}"


# ---- the native library --------------------------------------------------------------------------


class Object(NamedTuple):
    """One compilation; `recipe` says what was asked of which compiler, wherever that one lies."""

    source: Path
    command: list[str]
    recipe: str
    output: Path

    def stale(self) -> bool:
        """Whether the recipe or a file of this tree that the last compilation read has changed."""
        record, depfile = self.output.with_suffix(".cmd"), self.output.with_suffix(".d")
        if not (self.output.exists() and record.exists() and depfile.exists()):
            return True
        if record.read_text() != self.recipe:
            return True
        built = self.output.stat().st_mtime
        read = depfile.read_text().replace("\\\n", " ").partition(":")[2].split()
        ours = [Path(name) for name in read if not os.path.isabs(name)]
        return any(not path.exists() or path.stat().st_mtime >= built for path in ours)

    def compile(self) -> float:
        """Seconds it took."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.unlink(missing_ok=True)
        start = time.monotonic()
        depfile = str(self.output.with_suffix(".d"))
        subprocess.run([*self.command, "-MMD", "-MF", depfile], check=True)
        self.output.with_suffix(".cmd").write_text(self.recipe)
        return time.monotonic() - start


def native_objects(toolkit: Toolkit | None) -> list[Object]:
    cxx = shlex.split(os.environ.get("CXX") or "g++")
    cuda, cpu = Path("src/cuda"), Path("src/cpu")
    commands: dict[Path, list[str]] = {}
    if toolkit:
        kind = "cuda"
        archs = cuda_archs(toolkit.nvcc)
        version = "{}.{}".format(*toolkit.version)
        print(f"CUDA {version} ({toolkit.nvcc}) for {' '.join(archs)}", flush=True)
        for source in sorted(cuda.rglob("*.cu")):  # the longest compilations come first
            commands[source] = [toolkit.nvcc, *NVCC_FLAGS, *map(gencode, archs)]
        for source in sorted(set(cuda.rglob("*.cpp")) - {cuda / "absent.cpp"}):
            define = f'-DBCY_CUDA_ARCHS="{";".join(archs)}"'
            commands[source] = [*cxx, *CXX_FLAGS, define, f"-isystem{toolkit.include}"]
    elif EMULATED:
        arch = os.environ.get("BARACUDA_CUDA_ARCHS") or "90"
        if not re.fullmatch(r"7[5-9]|[89]\d", arch):
            sys.exit(f"BARACUDA_CUDA_ARCHS: expected one of 75 to 90 to emulate, got {arch!r}")
        kind = f"emulated-{arch}"
        print(f"CUDA {arch}, emulated", flush=True)
        flags = [*EMULATOR_FLAGS, f"-D__CUDA_ARCH__={arch}0", f'-DBCY_CUDA_ARCHS="{arch}"']
        flags += AVX2 if X86_64 else []
        units = [*sorted(cuda.rglob("*.cu")), cuda / "runtime.cpp", cuda / "xla.cpp"]
        for source in [*units, *EMULATOR.glob("*.cpp")]:
            commands[source] = [*cxx, *flags, "-x", "c++"]
    else:
        kind = "cpu"
        print("CPU only (BARACUDA_CUDA=0)", flush=True)
        commands[cuda / "absent.cpp"] = [*cxx, *CXX_FLAGS]
    for source in sorted(cpu.rglob("*.cpp")):
        isa = next((flags for end, flags in ISA_FLAGS.items() if source.stem.endswith(end)), [])
        if X86_64 or not isa:
            commands[source] = [*cxx, *CXX_FLAGS, *isa]
    objects = []
    for source, command in commands.items():
        output = BUILD / "native" / kind / source.with_suffix(source.suffix + ".o")
        command += [f"-I{INCLUDE}", "-Isrc", "-c", str(source), "-o", str(output)]
        recipe = shlex.join(command)
        if toolkit:  # pip unpacks the wheels somewhere else for every build
            recipe = recipe.replace(toolkit.nvcc, "nvcc").replace(str(toolkit.include), "include")
            recipe = f"CUDA {toolkit.version}: {recipe}"
        objects.append(Object(source, command, recipe, output))
    return objects


def build_library(toolkit: Toolkit | None) -> Path:
    objects = native_objects(toolkit)
    stale = [item for item in objects if item.stale()]
    with ThreadPoolExecutor(jobs()) as pool:
        runs = [(item, pool.submit(item.compile)) for item in stale]
        try:
            for done, (item, run) in enumerate(runs, 1):
                print(f"[{done}/{len(stale)}] {item.source} ({run.result():.0f} s)", flush=True)
        except subprocess.CalledProcessError as failure:
            pool.shutdown(cancel_futures=True)
            sys.exit(f"compilation failed: {shlex.join(map(str, failure.cmd))}")
    library = BUILD / "libbaracuda.a"
    record = library.with_suffix(".cmd")
    command = ["ar", "rcsD", str(library), *(str(item.output) for item in objects)]
    if (
        stale
        or not library.exists()
        or not record.exists()
        or record.read_text() != shlex.join(command)
    ):
        library.unlink(missing_ok=True)
        subprocess.run(command, check=True)
        record.write_text(shlex.join(command))
    return library


# ---- the Python modules --------------------------------------------------------------------------


class BuildExt(build_ext):
    def run(self):
        toolkit, refused = find_toolkit() if WITH_CUDA else (None, [])
        for reason in refused:
            print(f"passed over: {reason}", flush=True)
        if WITH_CUDA and not toolkit:
            oldest = "{}.{}".format(*OLDEST_TOOLKIT)
            wheels = " ".join(f"'{wheel.partition(';')[0]}'" for wheel in TOOLKIT_WHEELS)
            sys.exit(
                f"no complete CUDA toolkit, {oldest} or later, in $CUDA_HOME, on PATH or among "
                f"the installed wheels. Set CUDA_HOME, or run `pip install {wheels}`, or build the "
                "CPU backend alone with BARACUDA_CUDA=0."
            )
        BUILD.mkdir(exist_ok=True)
        with open(BUILD / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two builds of one tree would write the same objects
            library = build_library(toolkit)
            for extension in self.extensions:
                if extension.name in LINKED:
                    extension.extra_objects = [str(library)]
                    extension.depends += extension.extra_objects
                    extension.extra_link_args += ["-Wl,--exclude-libs,ALL", "-pthread"]
                    extension.libraries = ["stdc++"]
                if extension.name == "baracuda_cy._cuda" and toolkit:
                    extension.library_dirs = [str(toolkit.library)]
                    extension.libraries = ["cudart_static", "rt", "pthread", "dl", "stdc++"]
            self.translate()
            self.parallel = jobs()
            super().run()

    def translate(self):
        """Cython to C, under build/."""
        from Cython.Build import cythonize
        from Cython.Compiler.Errors import CompileError

        try:
            modules = cythonize(
                self.extensions,
                nthreads=jobs(),
                build_dir=str(BUILD / "cython"),
                include_path=["src"],
                compiler_directives={"language_level": 3},
            )
        except CompileError as error:  # the messages themselves are printed already
            sys.exit(f"Cython failed: {error}")
        sources = {module.name: module.sources for module in modules}
        for extension in self.extensions:
            extension.sources = sources[extension.name]


def extensions() -> list[Extension]:
    return [
        Extension(
            f"baracuda_cy.{source.stem}",
            [str(source)],
            include_dirs=[str(INCLUDE)],
            depends=["setup.py", *map(str, (INCLUDE / "baracuda").glob("*.h"))],
            define_macros=[] if FREE_THREADED else [("Py_LIMITED_API", "0x030b0000")],
            py_limited_api=not FREE_THREADED,
            extra_compile_args=["-g0", "-fvisibility=hidden"],
            extra_link_args=["-s"],
        )
        for source in sorted(PACKAGE.glob("*.pyx"))
    ]


def setup_requires() -> list[str]:
    """What this build needs beyond pyproject.toml: the compiler, where no toolkit is there.

    Front ends ask for it by running `egg_info`; any other command reports what is missing itself.
    """
    if WITH_CUDA and sys.argv[1:] == ["egg_info"] and not find_toolkit()[0]:
        return TOOLKIT_WHEELS
    return []


if __name__ == "__main__":  # cythonize's worker processes import this file
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildExt},
        setup_requires=setup_requires(),
        options={} if FREE_THREADED else {"bdist_wheel": {"py_limited_api": "cp311"}},
    )
