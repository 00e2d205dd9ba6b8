"""A run in several processes, on one machine or more: torchrun starts them, files in the run's folder steer them.

    notebook ── control.jsonl ──▶ first process ── orders, once a step ──▶ every process
             ◀── status.json, metrics.jsonl ──

The processes outlive the notebook's kernel: a new session on the same folder follows them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

import torch.distributed as dist

from .. import config
from ..config import LiveSettings, Settings
from ..errors import InUseError, RunError, RwkvNbError, TrainingError
from ..runs import Run, free_bytes, in_use, locked, read_rows, write_text
from .before import pick_device
from .ranks import JoinedRanks
from .session import TrainSession
from .snapshot import DONE, Sample, Snapshot, Waiting

SECONDS = 0.2   # between two looks at control.jsonl, and at least between two writings of status.json
LOOKS = 150     # so long until the processes of an ended run must be gone
FOLLOWED = "a run was at work here already: this is that run, under the settings that it began with"


def session_for(run: Run | str, settings: Settings | None = None, **options) -> TrainSession | LaunchedSession:
    """The session that fits the settings: in this process for one device, in processes of their own for more.

    A run that is at work already is followed: a notebook's cell that runs again shows the same training once more.
    """
    run = Run(run)
    here = [thread.session for thread in threading.enumerate() if hasattr(thread, "session")]
    for session in here if options.get("start", "auto") == "auto" else ():
        if session.run.folder.resolve() == run.folder.resolve() and not session.snapshot().done:
            return session
    settings = settings or run.settings()
    many = settings.train.devices * settings.train.num_nodes > 1
    if many:
        options.pop("ask", None)  # of one process alone
    return (LaunchedSession if many else TrainSession)(run, settings, **options)


class LaunchedSession(Waiting):
    """What a TrainSession is, for a run in processes of its own: the same controls, the same snapshots.

    Where memory runs out it ends and says what to change; the new session goes on from the last checkpoint.
    """

    def __init__(self, run: Run | str, settings: Settings | None = None, *, prompts: Sequence[str] = (),
                 start: str = "auto", max_tokens: int = 60):
        self.run = Run(run)
        self.settings = settings or self.run.settings()
        config.check_together(self.settings)
        self._options = {"prompts": list(prompts), "start": start, "max_tokens": max_tokens}
        self._process, self._started = None, False
        self._rows, self._read, self._reading = [], 0, threading.Lock()  # a cell and a panel read at once
        self._control, self._status = self.run.folder / "control.jsonl", self.run.folder / "status.json"
        node = self.settings.train.node_rank
        self._plan, self._log = (self.run.folder / f"launch-{node}.{kind}" for kind in ("json", "log"))

    def start(self) -> LaunchedSession:
        """Start the processes and return at once; where they are at work on this folder already, follow them."""
        if self._started:
            raise RunError("this session has been started already", where=self.run.folder, fix="make a new one")
        for _ in range(LOOKS):        # the processes of a run that has ended take a moment to be gone
            with contextlib.suppress(InUseError), locked(self._log) as log:
                self._launch(self.settings.train, log)
            if self._process or self._told().get("status") not in DONE:
                break
            time.sleep(SECONDS)
        else:
            raise RunError("processes of the run that has ended here are still there", where=self.run.folder,
                           fix="end them, or give this run another folder")
        self._started = True          # only now: what kept it from starting can be mended, and start() called again
        return self

    def _told(self) -> dict:
        """What the first process last said; nothing before it has."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads(self._status.read_text(encoding="utf-8"))
        return {}

    def _launch(self, t: config.TrainSettings, log: FileIO) -> None:
        """Start the processes. The log is what they write to, so each holds it as long as it lives, whoever dies."""
        pick_device(t.accelerator, t.devices - 1)     # what is not there is said now
        command = [*torchrun(t), "-m", "rwkv_nb.train.launch", str(self._plan)]
        if not t.node_rank:
            self._control.unlink(missing_ok=True)
            self._status.unlink(missing_ok=True)
        write_text(self._plan, json.dumps({"settings": dataclasses.asdict(self.settings), **self._options}))
        threads = str(max(1, len(os.sched_getaffinity(0)) // t.devices))  # torchrun would give each process one
        self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                         start_new_session=True, env={"OMP_NUM_THREADS": threads, **os.environ})

    def _send(self, what: str, **values) -> None:
        with open(self._control, "a", encoding="utf-8") as f:
            f.write(json.dumps({"do": what, "values": values}) + "\n")

    def pause(self) -> None:
        """Hold every process after the step under way."""
        self._send("pause")

    def resume(self) -> None:
        """Go on after a pause."""
        self._send("resume")

    def stop(self) -> None:
        """End after the step under way, with a checkpoint and an adapter."""
        self._send("stop")

    def save_now(self) -> None:
        """Save an adapter and a checkpoint after the step under way, or while paused."""
        self._send("save_now")

    def change(self, **changes) -> LiveSettings:
        """Change LiveSettings by name in every process, from the next optimizer step on."""
        live = config.replace(self.snapshot().live, **changes)
        if self._started:
            self._send("change", **changes)
        else:
            self.settings = config.replace(self.settings, **changes)
        return live

    def snapshot(self) -> Snapshot:
        """The run as its first process last wrote it down."""
        told, asked = {"status": "ready"}, []
        if self._started:
            alive = self._process.poll() is None if self._process else in_use(self._log)
            told, asked = {"status": "preparing"} | self._told(), [order["do"] for order in read_rows(self._control)]
            if not alive and told["status"] not in DONE:
                well = self._process and self._process.returncode == 0      # a machine that has not the first process
                told["status"] = "finished" if well else "failed"
        paused = [what for what in asked if what in ("pause", "resume")][-1:] == ["pause"]
        told |= {"paused": paused, "stopping": told.get("stopping") or "stop" in asked}
        if told["status"] == "failed":
            told["error"] = self._last_words()
        if self._started and not self._process:
            told["notices"] = [FOLLOWED, *told.get("notices", ())]
        live, early = told.pop("live", None), told["status"] in ("ready", "preparing")
        return Snapshot(**told | {
            "rows": () if early else self._new_rows(), "samples": tuple(Sample(**s) for s in told.get("samples", ())),
            "live": config.from_dict(LiveSettings, live) if live else self.settings.train.live})

    def _new_rows(self) -> tuple[dict, ...]:
        """metrics.jsonl, of which only what is new is read; while a run prepares it may still be cut or set aside."""
        with self._reading, contextlib.suppress(FileNotFoundError), open(self.run.metrics_file, "rb") as f:
            f.seek(self._read)
            whole, end, _ = f.read().rpartition(b"\n")
            self._rows += [json.loads(line) for line in whole.splitlines()]
            self._read += len(whole) + len(end)
        return tuple(self._rows)

    def _last_words(self) -> str:
        log = self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""
        ours = re.search(r"^error in process \d+: (.*(?:\n→.*)?)", log, re.MULTILINE)
        if not ours and free_bytes(self.run.folder) < 2**20:
            return "the disk is full, and what the processes said of it was lost"
        return ours[1] if ours else f"a process ended; {self._log.name} ends in\n" + "\n".join(log.splitlines()[-12:])

    def result(self) -> Snapshot:
        """The last snapshot. Raises TrainingError with what stopped the training."""
        now = self.snapshot()
        if now.status == "failed":
            raise TrainingError(now.error, where=self.run.folder, fix="mend it and start again: the last checkpoint is "
                                                                      "whole")
        return now


def torchrun(t: config.TrainSettings) -> list[str]:
    """The command that starts this machine's processes; what they run is to follow."""
    where = ["--standalone"]
    if t.num_nodes > 1:
        host, _, port = t.master_addr.rpartition(":")
        where = ["--nnodes", str(t.num_nodes), "--node_rank", str(t.node_rank), "--master_addr", host,
                 "--master_port", port]
    return [sys.executable, "-m", "torch.distributed.run", *where, "--nproc_per_node", str(t.devices)]


def work(plan: Path) -> int:
    """One process of a run, started by torchrun; the first one obeys control.jsonl and writes status.json."""
    asked, folder = json.loads(plan.read_text(encoding="utf-8")), plan.parent
    settings = config.from_dict(Settings, asked.pop("settings"))
    local = int(os.environ["LOCAL_RANK"])
    device = pick_device(settings.train.accelerator, local)
    ranks = JoinedRanks(local, device.type == "cuda")
    session = TrainSession(Run(folder), settings, ranks=ranks, **asked)
    signal.signal(signal.SIGTERM, lambda *_: session.stop())
    session.start()
    control, obeyed = folder / "control.jsonl", 0
    while True:
        now = session.snapshot()
        if ranks.rank == 0:
            for order in read_rows(control)[obeyed:]:
                getattr(session, order["do"])(**order["values"])
                obeyed += 1
            told = dataclasses.replace(now, rows=())    # those are in metrics.jsonl
            write_text(folder / "status.json", json.dumps(dataclasses.asdict(told)))
        if now.done:
            break
        time.sleep(SECONDS)
    try:
        session.result()
    except RwkvNbError as error:
        print(f"error in process {ranks.rank}: {error}", file=sys.stderr)
        return 1
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1])))
