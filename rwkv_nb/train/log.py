"""A run's two logs: metrics.jsonl, a row a step, and train_log.txt, a line an epoch as RWKV's tools write it."""

import json
import math
import os
from datetime import datetime

from .. import config
from ..errors import RunError
from ..extras import extra
from ..runs import Run


class Logs:
    """Appends to both files; sizes() and cut() let a resumed run drop what came after its checkpoint.

    write=False keeps silent, for all processes of a run but the first. The project that settings.train.wandb names
    gets the rows too.
    """

    def __init__(self, run: Run, settings: config.Settings, *, write: bool = True):
        self._settings = settings
        self._files = {"metrics": run.metrics_file, "train_log": run.log_file} if write else {}
        self._wandb = _open_wandb(run, settings) if write and settings.train.wandb else None

    def new_run(self) -> None:
        """Head of a new run in train_log.txt."""
        self._append("train_log", f"NEW RUN {datetime.now():%Y-%m-%d-%H-%M-%S}\n{config.to_json(self._settings)}\n")

    def row(self, row: dict) -> None:
        """One line of metrics.jsonl: a step's figures, or an event such as a changed setting."""
        self._append("metrics", json.dumps(row, ensure_ascii=False) + "\n")
        if self._wandb:
            self._wandb.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def epoch(self, epoch: int, loss: float, lr: float) -> None:
        """One line of train_log.txt: epoch, mean loss, perplexity, learning rate, time, epoch."""
        perplexity = math.exp(min(loss, 700))
        self._append("train_log", f"{epoch} {loss:.6f} {perplexity:.4f} {lr:.8f} {datetime.now()} {epoch}\n")

    def sizes(self) -> dict[str, int]:
        """Bytes of each file now."""
        return {name: path.stat().st_size if path.exists() else 0 for name, path in self._files.items()}

    def cut(self, sizes: dict[str, int]) -> None:
        """Drop everything behind the given sizes; in one process alone, others may have written meanwhile."""
        for name, path in self._files.items():
            if path.exists() and path.stat().st_size > sizes[name]:
                os.truncate(path, sizes[name])

    def close(self) -> None:
        """Let wandb write what it still holds."""
        if self._wandb:
            self._wandb.finish()

    def _append(self, name: str, text: str) -> None:
        path = self._files.get(name)
        if not path:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as f:
                f.write(text)
        except OSError as error:
            raise RunError(f"could not write ({error.strerror or error})", where=path,
                           fix="free some disk space, then resume: the last checkpoint is whole") from error


def _open_wandb(run: Run, settings: config.Settings):
    """A wandb run; one that goes on from a checkpoint is another one in the same group."""
    wandb = extra("wandb", "wandb")
    online = wandb.login(prompt=False, verify=False)  # without an account the files stay in the run's folder
    return wandb.init(project=settings.train.wandb, name=run.name, group=run.name, dir=run.folder,
                      config=config.values(settings), settings=wandb.Settings(console="off", silent=True),
                      **({} if online else {"mode": "offline"}))


def as_it_was(run: Run) -> tuple[config.Settings, dict[int, dict]]:
    """A run's settings as it began, and its changes by the number of steps done before them.

    Raises RunError where nothing was started.
    """
    planned = {}
    try:
        began = json.loads(run.started_file.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"this run cannot be replayed ({error})", where=run.started_file,
                       fix="train it once; started.json is written then") from error
    for row in run.metrics():
        if row.get("event") == "change":
            planned.setdefault(row["step"], {})[row["name"]] = row["to"]
    return config.from_dict(config.Settings, began), planned
