# SPDX-License-Identifier: Apache-2.0
"""``python -m baracuda_cy``: what this build and this machine have."""

import argparse
import signal
import sys
from collections.abc import Sequence

import baracuda_cy
from baracuda_cy import _cpu, _cuda


def main(arguments: Sequence[str] = ()) -> None:
    """Print the version, the CPU backend and the GPUs."""
    parser = argparse.ArgumentParser(prog="python -m baracuda_cy", description=main.__doc__)
    parser.parse_args(arguments)
    print(f"baracuda-cy {baracuda_cy.__version__}")
    print(f"CPU   {_cpu.isa()}, {_cpu.default_threads()} threads")
    built = " ".join(_cuda.architectures()) if _cuda.built() else "not in this build"
    toolkit = _cuda.toolkit_version()
    version = " (CUDA {}.{})".format(*toolkit) if toolkit else ""
    print(f"CUDA  kernels for {built}{version}" if _cuda.built() else f"CUDA  {built}")
    reason = _cuda.why_unavailable()
    if reason is not None:
        print(f"GPU   none: {reason}")
        return
    for device in range(_cuda.device_count()):
        major, minor = _cuda.compute_capability(device)
        print(f"GPU   cuda:{device} {_cuda.device_name(device)} sm_{major}{minor}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly where the reader has gone
    main(sys.argv[1:])
