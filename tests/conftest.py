"""What every test shares."""

import os

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _share_the_cores():
    """pytest-xdist's workers side by side: each takes its share of the cores, or they slow each other down."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))
