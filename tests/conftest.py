# SPDX-License-Identifier: Apache-2.0
import hypothesis
import problems
import pytest

from baracuda_cy import _cuda

# How long an example takes says more about the machine's neighbours than about the code.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.load_profile("default")


def pytest_collection_modifyitems(items):
    reason = _cuda.why_unavailable()
    for item in items:
        mark = item.get_closest_marker("gpu")
        if mark is None:
            continue
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {reason}"))
        elif problems.EMULATED and "real" in mark.kwargs:
            item.add_marker(pytest.mark.skip(reason=f"needs a real GPU: {mark.kwargs['real']}"))
