# SPDX-License-Identifier: Apache-2.0
import hypothesis
import pytest

from baracuda_cy import _cuda

# How long an example takes says more about the machine's neighbours than about the code.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.load_profile("default")


def pytest_collection_modifyitems(items):
    reason = _cuda.why_unavailable()
    emulated = reason is None and _cuda.device_name() == "Emulated GPU"
    for item in items:
        mark = item.get_closest_marker("gpu")
        if mark is None:
            continue
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {reason}"))
        elif emulated and "real" in mark.kwargs:
            item.add_marker(pytest.mark.skip(reason=f"needs a real GPU: {mark.kwargs['real']}"))
