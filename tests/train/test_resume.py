"""What a run goes on from: its file, and what may change until then."""

import dataclasses

import pytest
import torch

from rwkv_nb.config import LiveSettings, Settings
from rwkv_nb.errors import RunError
from rwkv_nb.runs import Run
from rwkv_nb.train.checkpoint import Checkpoint, load_checkpoint

EMPTY = Checkpoint(step=3, adapter={}, optimizer={}, data={}, epoch_loss=[], losses=[], loss_scale=[],
                   live=LiveSettings(), settings=Settings(), base="", log_sizes={}, finished=False)


def test_saving_copies_no_tensor(tmp_path):
    """A tensor that was computed cannot be copied with the object around it: torch refuses."""
    computed = torch.ones(5, requires_grad=True) * 2
    dataclasses.replace(EMPTY, adapter={"a": computed}).save(Run(tmp_path))
    assert torch.equal(load_checkpoint(Run(tmp_path)).adapter["a"], computed)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04", b"\x80\x02.", b"\x80\x02a."])
def test_a_damaged_file_is_named(tmp_path, damage):
    Run(tmp_path).checkpoint_file.write_bytes(damage)
    with pytest.raises(RunError, match="checkpoint.pt: the checkpoint cannot be read"):
        load_checkpoint(Run(tmp_path))
