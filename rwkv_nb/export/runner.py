"""RWKV Runner: the .pth that its engine, the rwkv package, loads."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError
from ..model import load_weights, read_shape, save_weights
from ..model.checkpoint import check_keys
from ..model.streaming import Progress
from ..runs import check_output

WORLD_ROWS = 65536


def export_runner(source: str | Path, out: str | Path, *, progress: Progress | None = None) -> str:
    """A complete model (.pth or Ai00's .st) as Runner wants it: original names, orientation and order, dtypes kept.

    Returns what to do with the file. Raises CheckpointError for a model that Runner would not load.
    """
    weights = load_weights(source)
    shape = read_shape(weights)
    check_keys(weights, shape, where=source)
    check_for_other_programs(shape, source)
    check_output(Path(out), ".pth", source)
    save_weights(out, {key: weights[key] for key in shape.key_shapes()}, progress=progress)
    return f"{out}: put it into RWKV Runner's models folder"


def check_for_other_programs(shape, source) -> None:
    """Raise CheckpointError for a vocabulary or a depth that Runner and Ai00 do not know."""
    if shape.vocab_size < WORLD_ROWS:
        raise CheckpointError(f"its vocabulary has {shape.vocab_size} rows; RWKV Runner and Ai00 know the World "
                              f"vocabulary of {WORLD_ROWS}", where=source, fix="train a released base; a tiny model of "
                              "bytes runs here and in the rwkv package")
    if shape.n_layer < 2:
        raise CheckpointError("it has one block; RWKV Runner and Ai00 know a model's version by its second",
                              where=source, fix="use a model of two blocks or more")
