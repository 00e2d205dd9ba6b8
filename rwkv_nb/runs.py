"""A run is a folder: settings, logs, adapters, merged models, checkpoint, figures.

Everything is written whole: temporary file beside the target, fsync, rename.
"""

import contextlib
import fcntl
import itertools
import json
import os
import shutil
import threading
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from . import config
from .errors import InUseError, RunError, SettingsError
from .words import bytes_text

# What a run leaves: first what it goes on from, so that half a move leaves nothing to go on from without its logs.
MADE = ("checkpoint.pt", "started.json", "metrics.jsonl", "train_log.txt", "adapter-*.safetensors", "rwkv-*.pth",
        "merged.pth", "score.*", "loss.png")
_FAILED_WRITES = ("inline_container", "PytorchStreamWriter", "I/O error")  # torch's and safetensors' own words


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`; renamed onto it when the block ends well, removed otherwise.

    Raises RunError when the disk is full or the folder cannot be written; the old file is intact then.
    """
    target = Path(target)
    temporary = target.with_name(f".{target.name}.{threading.get_native_id()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, target)
    except Exception as error:
        if not isinstance(error, OSError) and not any(words in str(error) for words in _FAILED_WRITES):
            raise
        why = getattr(error, "strerror", None) or f"the system takes no more; {bytes_text(free_bytes(target))} are free"
        raise RunError(f"could not write ({why}); what was there before is intact", where=target,
                       fix="free some disk space or choose another folder, then save again") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def free_bytes(path: Path) -> int:
    """What the disk still takes where `path` is, or will be."""
    return shutil.disk_usage(next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())).free


def check_disk(need: int, target: Path) -> None:
    """Raise RunError unless `need` bytes are free where `target` is to be; an old file stays until then."""
    free = free_bytes(target)
    if need > free:
        raise RunError(f"it needs {bytes_text(need)} and {bytes_text(free)} are free", where=target,
                       fix="free some disk space or choose another folder")


def check_output(target: Path, suffix: str, *sources: str | Path) -> None:
    """Raise RunError where `target` is one of the files that it is made from, or has another format's name."""
    if target.exists() and any(Path(source).exists() and target.samefile(source) for source in sources):
        raise RunError("this would replace what it is made from", where=target, fix="choose another output")
    if target.suffix != suffix:
        raise RunError(f"what is written is a {suffix}", where=target, fix=f"choose a name that ends in {suffix}")


def write_text(target: Path, text: str) -> None:
    """Write a text file whole (UTF-8)."""
    write_bytes(target, text.encode())


def write_bytes(target: Path, data: bytes) -> None:
    """Write a file whole."""
    with atomic_path(target) as path:
        path.write_bytes(data)


def read_rows(path: Path) -> list[dict]:
    """The rows of a .jsonl, none where there is no file; what is half written is left out."""
    rows = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def path_settings(settings: config.Settings) -> dict[str, str]:
    """The settings that name a file which is given, by name; a data set by its name is none."""
    values, names = config.values(settings), ["load_model", "data_file", "mix_file", "eval_file"]
    if values["data_type"] == "sft" and not os.path.exists(values["data_file"]):
        names.remove("data_file")
    return {name: values[name] for name in names if values[name]}


def absolute(settings: config.Settings) -> config.Settings:
    """The same settings with absolute paths: any folder finds what they name. Raises SettingsError for bad values."""
    config.check(settings)
    return config.replace(settings, **{name: os.path.abspath(os.path.expanduser(path))
                                        for name, path in path_settings(settings).items()})


@contextlib.contextmanager
def locked(path: Path) -> Iterator[FileIO]:
    """A file, made anew but for a line that names this process, and held; the system frees it when this process is
    dead, and each that was given the open file.

    Raises InUseError when another process holds it, and RunError where it cannot be written.
    """
    with contextlib.ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            f = held.enter_context(open(path, "a+b", buffering=0))    # a buffer would fail once more as it is closed
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            f.truncate(0)
            f.write(f"process {os.getpid()}\n".encode())
        except BlockingIOError as error:
            f.seek(0)
            raise InUseError(f"another training run uses this folder ({f.readline().decode().strip() or 'process ?'})",
                             where=path.parent, fix="stop that run, or give this one another name") from error
        except OSError as error:
            raise RunError(f"this folder cannot be written ({error.strerror})", where=path.parent,
                           fix="choose another folder, or free some disk space") from error
        yield f


def in_use(path: Path) -> bool:
    """Whether a process holds a file by locked()."""
    try:
        with open(path, encoding="utf-8") as f:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


class Run:
    """The folder `runs/<name>/` and the names of what is in it. It is a path itself, so Run(run) is the same run."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.settings_file = self.folder / "settings.json"
        self.started_file = self.folder / "started.json"    # settings, data, base and versions as the run began
        self.metrics_file = self.folder / "metrics.jsonl"
        self.log_file = self.folder / "train_log.txt"
        self.checkpoint_file = self.folder / "checkpoint.pt"

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    def __fspath__(self) -> str:
        return str(self.folder)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def adapter_file(self, epoch: int | str) -> Path:
        """adapter-{epoch}.safetensors"""
        return self.folder / f"adapter-{epoch}.safetensors"

    def merged_file(self, epoch: int | str) -> Path:
        """rwkv-{epoch}.pth, the complete merged model (the tutorial's name)."""
        return self.folder / f"rwkv-{epoch}.pth"

    def adapters(self) -> list[Path]:
        """Saved adapters, oldest first."""
        return sorted(self.folder.glob("adapter-*.safetensors"), key=lambda p: (p.stat().st_mtime_ns, p.name))

    def last_adapter(self) -> Path:
        """The adapter saved last. Raises RunError when there is none."""
        found = self.adapters()
        if not found:
            raise RunError("there is no adapter in this run yet", where=self.folder,
                           fix="train it first: notebook 03_train_lora, or `rwkv-nb train`")
        return found[-1]

    def settings(self) -> config.Settings:
        """settings.json, or the defaults where there is none. Raises SettingsError for a damaged file."""
        if not self.settings_file.exists():
            return config.Settings()
        try:
            settings = config.from_dict(config.Settings, json.loads(self.settings_file.read_text(encoding="utf-8-sig")))
            config.check(settings)
            return settings
        except SettingsError as error:
            raise SettingsError(error.what, where=self.settings_file, fix=error.fix) from error
        except (OSError, ValueError) as error:
            raise SettingsError(f"settings cannot be read ({error})", where=self.settings_file,
                                fix="mend the JSON or delete the file and run 01_prepare_data again") from error

    def save_settings(self, settings: config.Settings) -> None:
        """Check and write settings.json whole; paths become absolute, so that any notebook finds them."""
        write_text(self.settings_file, config.to_json(absolute(settings)) + "\n")

    def update(self, **changes) -> config.Settings:
        """Change some settings by name, write settings.json, return all of them."""
        self.save_settings(config.replace(self.settings(), **changes))
        return self.settings()

    def metrics(self) -> list[dict]:
        """metrics.jsonl, as read_rows() reads it."""
        return read_rows(self.metrics_file)

    def set_aside(self) -> Path | None:
        """Move what an earlier run left to previous-N/; settings.json stays. Returns that folder, or None."""
        products = [path for pattern in MADE for path in self.folder.glob(pattern)]
        if not products:
            return None
        aside = next(p for n in itertools.count(1) if not (p := self.folder / f"previous-{n}").exists())
        aside.mkdir()
        for product in products:
            product.rename(aside / product.name)
        if self.settings_file.exists():
            shutil.copy2(self.settings_file, aside)
        return aside

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for one training process. Raises as locked() does."""
        with locked(self.folder / ".lock"):
            for path in self.folder.glob(".*.tmp"):    # what threads of processes that were killed had half written
                thread = path.name.split(".")[-2]
                if thread.isdigit() and not Path("/proc", thread).exists():
                    path.unlink(missing_ok=True)
            yield
