# SPDX-License-Identifier: Apache-2.0
"""Machines whose driver is too old, played by a libcuda of the test's own."""

import shutil
import subprocess

import problems
import pytest

from baracuda_cy import _cuda

DRIVER = r"""
#include <string.h>
static int succeed(void) { return 0; }
static int cuGetExportTable(const void** table, const void* id) {
  (void)id;
  *table = 0;
  return 500;  /* not found */
}
int cuDriverGetVersion(int* version) { *version = 12000; return 0; }
int cuInit(unsigned flags) { (void)flags; return 0; }
int cuGetProcAddress_v2(const char* name, void** function, int version, unsigned long long flags,
                        int* status) {
  (void)version, (void)flags;
  if (status) *status = 0;
  *function = (void*)succeed;
  if (!strcmp(name, "cuDriverGetVersion")) *function = (void*)cuDriverGetVersion;
  if (!strcmp(name, "cuInit")) *function = (void*)cuInit;
  if (!strcmp(name, "cuGetExportTable")) *function = (void*)cuGetExportTable;
  if (!strcmp(name, "cuGetProcAddress")) *function = (void*)cuGetProcAddress_v2;
  return 0;
}
"""


@pytest.fixture
def old_driver(tmp_path):
    """An environment in which the driver supports CUDA 12.0."""
    if not _cuda.built():
        pytest.skip("this build has no CUDA kernels")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler is here")
    source = tmp_path / "driver.c"
    source.write_text(DRIVER)
    library = tmp_path / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return {"LD_LIBRARY_PATH": str(tmp_path)}


def test_a_driver_too_old_is_named_with_what_is_needed(old_driver):
    said = problems.child(
        """
        import baracuda_cy as bcy

        sizes = bcy.GgufMmvqDescriptor(nrows=1, ncols=32)
        for attempt in (
            lambda: bcy.DeviceBuffer(16),
            lambda: bcy.Stream(),
            lambda: bcy.GgufMmvqPlan.select("cuda", sizes),
        ):
            try:
                attempt()
            except bcy.Unsupported as error:
                print(error)
        """,
        **old_driver,
    )
    needed = ".".join(map(str, _cuda.toolkit_version()))
    lines = said.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert f"supports CUDA 12.0, this build needs {needed}" in line
        assert "update the driver" in line


def test_the_cpu_works_under_a_driver_too_old(old_driver):
    said = problems.child(
        """
        import numpy as np
        import baracuda_cy as bcy

        w = bcy.quantize(np.eye(64, dtype=np.float32), "Q8_0")
        print(bcy.linear(np.ones((2, 64), np.float32), w).sum())
        """,
        **old_driver,
    )
    assert float(said) == pytest.approx(128, rel=1e-2)
