"""A base that takes part in every layer, made once."""

import pytest
import torch
from lora_files import make_base


@pytest.fixture(scope="session")
def lively(tmp_path_factory):
    """Path of a lively base."""
    return make_base(tmp_path_factory.mktemp("lively") / "lively.pth")


@pytest.fixture
def tokens():
    return torch.randint(1, 257, (2, 19))
