"""These tests run kernels in Triton's interpreter, on a CPU: in a process with TRITON_INTERPRET=1, which is read when a
kernel is defined. `tests/kernels/test_interpreted.py` starts one."""

import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    elsewhere = pytest.mark.skip(reason="runs in the interpreter, from tests/kernels/test_interpreted.py")
    for item in items:
        if "tests/kernels/gpu" in item.path.as_posix():
            item.add_marker(elsewhere)
