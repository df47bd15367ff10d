"""Fixtures that every test may use."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Two busy threads on two busy cores collapse; tests compare numbers, not speed."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
