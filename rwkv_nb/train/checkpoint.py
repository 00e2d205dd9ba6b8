"""What a run needs to go on exactly where it was: one file, written whole, loaded without running code.

Dropout needs no random state here: its masks follow from (seed, step, micro-batch, layer), see lora.layers.
"""

from dataclasses import asdict, dataclass

import torch

from .. import config
from ..config import LiveSettings, Settings
from ..errors import RunError
from ..fit import SAME_NUMBERS
from ..runs import Run, atomic_path

FORMAT = 2
# What may change between a checkpoint and its resumption: where it runs, where base and data lie, what is watched, what
# is written, and what needs less memory for the same numbers (the order of the data does not depend on micro_bsz).
FREE = {*config.values(LiveSettings()), "load_model", "data_file", "mix_file", "proj_dir", "checkpoint_seconds",
        "devices", "num_nodes", "node_rank", "master_addr", "strategy", "eval_file", "early_stop", "spike_factor",
        "on_spike", "wandb", "merge", "epoch_save", *SAME_NUMBERS}


@dataclass(frozen=True)
class Checkpoint:
    """A run's state after `step` optimizer steps."""

    step: int
    adapter: dict          # lora_A, lora_B by key, fp32
    optimizer: dict        # AdamW's state_dict
    data: dict             # Batches.state()
    epoch_loss: list       # [Σ cross-entropy, trained tokens] of the epoch so far
    losses: list           # of the last steps, by which a spike is known
    loss_scale: list       # fp16's loss scale, and good steps under it
    live: LiveSettings     # as they were at this step
    settings: Settings     # as the run began, or last went on
    base: str              # fingerprint of the base model
    log_sizes: dict        # bytes of each log
    finished: bool
    format: int = FORMAT

    def save(self, run: Run) -> None:
        """Write checkpoint.pt whole; the one before stays until then. No tensor is copied beside itself first."""
        with atomic_path(run.checkpoint_file) as path:
            torch.save(vars(self) | {"live": asdict(self.live), "settings": asdict(self.settings)}, path)


def load_checkpoint(run: Run) -> Checkpoint | None:
    """The run's checkpoint on the CPU, or None where there is none. Raises RunError for a damaged file."""
    path = run.checkpoint_file
    if not path.exists():
        return None
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']}")
        live, settings = (config.from_dict(kind, values[name]) for kind, name in ((LiveSettings, "live"),
                                                                                 (Settings, "settings")))
        return Checkpoint(**values | {"live": live, "settings": settings})
    except Exception as error:  # torch raises whatever the damage leads to
        raise RunError("the checkpoint cannot be read", where=path,
                       fix="start afresh (start='fresh' keeps the old files aside); saved adapters are not touched"
                       ) from error


def differences(checkpoint: Checkpoint, settings: Settings) -> list[str]:
    """Settings in which a checkpoint's run differs from what is asked for now, other than FREE ones, in words.

    A setting that the checkpoint's version did not have was at its default.
    """
    then, now = config.values(checkpoint.settings), config.values(settings)
    return [f"{name}: {then[name]!r} → {value!r}" for name, value in now.items()
            if name not in FREE and then[name] != value]


def to_resume(run: Run, settings: Settings, start: str, base: str, data: dict) -> tuple[Checkpoint | None, str]:
    """The checkpoint that a run goes on from, or None and the reason. start: as of TrainSession; base: its fingerprint;
    data: Batches.state() of a run that begins. Base and data are known by these, wherever their files lie now.

    Raises RunError where "resume" asks for what cannot be.
    """
    if start == "fresh":
        return None, "start='fresh'"
    saved = load_checkpoint(run)
    if saved and not (changed := differences(saved, settings)):
        changed += ["load_model: another base than it began with"] * (saved.base != base)
        changed += ["data_file, mix_file: other documents than it began with"] * (saved.data | {"position": 0} != data)
    if saved is None:
        reason = "it had no checkpoint"
    elif changed:
        reason = f"settings changed: {'; '.join(changed)}"
    elif saved.finished:
        reason = "it was finished"
    else:
        return saved, ""
    if start == "resume":
        raise RunError(f"cannot go on from a checkpoint: {reason}", where=run.checkpoint_file,
                       fix="set the settings back, or use start='fresh'")
    return None, reason
