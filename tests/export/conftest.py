"""A base with the World vocabulary, and an adapter of it."""

import pytest
import torch
from lora_files import make_adapter, make_base


@pytest.fixture(scope="session")
def lively_world(tmp_path_factory):
    """Paths of base (fp16) and adapter (r 4, alpha 12)."""
    folder = tmp_path_factory.mktemp("world")
    base = make_base(folder / "base.pth", dtype=torch.float16, vocab_size=65536)
    return base, make_adapter(folder / "a.safetensors", base)[0]
