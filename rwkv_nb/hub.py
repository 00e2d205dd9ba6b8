"""Published base models by name, from the Hugging Face hub or a mirror of it."""

import difflib
import hashlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .errors import CheckpointError
from .runs import check_disk
from .words import bytes_text

# Where each family lies, and the files that its names stood for when this was written; newer ones are found as well.
REPOSITORIES = {"rwkv7-": "BlinkDL/rwkv7-g1", "rwkv-x070": "BlinkDL/rwkv-7-world",
                "rwkv-x060": "BlinkDL/rwkv-6-world", "rwkv-5": "BlinkDL/rwkv-5-world"}
KNOWN = {
    "rwkv7-g1-0.1b": "20250307-ctx4096", "rwkv7-g1-0.4b": "20250324-ctx4096", "rwkv7-g1-1.5b": "20250429-ctx4096",
    "rwkv7-g1-2.9b": "20250519-ctx4096", "rwkv7-g0-7.2b": "20250722-ctx4096", "rwkv7-g1d-0.1b": "20260129-ctx8192",
    "rwkv7-g1d-0.4b": "20260210-ctx8192", "rwkv7-g1d-1.5b": "20260212-ctx8192", "rwkv7-g1d-2.9b": "20260131-ctx8192",
    "RWKV-x070-World-0.1B-v2.8": "20241210-ctx4096", "RWKV-x070-World-0.4B-v2.9": "20250107-ctx4096",
    "RWKV-x070-World-1.5B-v3": "20250127-ctx4096", "RWKV-x070-World-2.9B-v3": "20250211-ctx4096"}


class Published(NamedTuple):
    """A file of the hub: its repository, name, bytes, and sha256 ("" where the hub does not say it)."""

    repository: str
    file: str
    size: int
    sha256: str


def repository(name: str) -> str:
    """Where a model of this name lies. Raises CheckpointError for a name of no family, with the nearest ones."""
    for start, repo in REPOSITORIES.items():
        if name.lower().startswith(start):
            return repo
    near = difflib.get_close_matches(name, KNOWN, 3, 0.3) or list(KNOWN)[:3]
    raise CheckpointError(f"there is no published model {name!r}", where="name", fix=f"such as {', '.join(near)}")


def find(name: str, *, endpoint: str | None = None) -> Published:
    """The newest published file of that name (with or without its date), and its size, before anything is fetched.

    endpoint: the hub's address; None takes the HF_ENDPOINT setting, else the hub itself.
    Raises CheckpointError for a name that is not there, and where the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    repo, start = repository(name), name.lower().removesuffix(".pth")
    try:
        files = HfApi(endpoint=endpoint).model_info(repo, files_metadata=True, timeout=20).siblings or []
    except Exception as error:  # httpx's, the hub's and the system's own errors
        raise _unreachable(name, repo, error) from error
    models = {Path(f.rfilename).name: f for f in files if f.rfilename.endswith(".pth")}
    fits = [file for file in models if re.fullmatch(re.escape(start) + r"(-\d{8}.*)?\.pth", file.lower())]
    if not fits:
        near = difflib.get_close_matches(name, models, 4, 0.3)
        raise CheckpointError(f"there is no {name!r} in {repo}", where=repo,
                              fix=f"there are {', '.join(near or sorted(models)[:4])}")
    found = models[max(fits, key=lambda file: re.findall(r"-20\d{6}", file))]     # by date, if there is one
    return Published(repo, found.rfilename, found.size or 0, found.lfs.sha256 if found.lfs else "")


def get(name: str, folder: str | Path = "models", *, endpoint: str | None = None, say: Callable[[str], None] = print,
        progress: Callable[[int, int], None] | None = None) -> Path:
    """Fetch a published base model into `folder`; returns its path. A file that is there already is checked and kept.

    An interrupted download goes on where it stopped. say: told the size first; progress: bytes here, bytes in all
    (None shows the hub's own bar). Raises CheckpointError for an unknown name, a hub that cannot be reached, a disk
    that is too small and a file that is not what the hub says it is (it is removed then).
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get  # hf_hub_download throws an interrupted download away

    found, folder = find(name, endpoint=endpoint), Path(folder)
    path = part = folder / Path(found.file).name
    say(f"{found.file}: {bytes_text(found.size)}, from {found.repository} into {folder}")
    if not path.is_file() or path.stat().st_size != found.size:
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        check_disk(found.size - (part.stat().st_size if part.exists() else 0), path)
        try:
            with open(part, "ab") as file:
                http_get(hf_hub_url(found.repository, found.file, endpoint=endpoint), file, resume_size=file.tell(),
                         expected_size=found.size, tqdm_class=_watched(progress) if progress else None)
        except Exception as error:  # as above
            raise _unreachable(name, found.repository, error) from error
    if found.sha256:
        with open(part, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != found.sha256:
            part.unlink(missing_ok=True)
            raise CheckpointError(f"its checksum is {digest[:16]}…, the hub says {found.sha256[:16]}…; it was removed",
                                  where=part, fix="get it again; if that does not help, use another mirror")
    part.rename(path)
    say(f"{path}: checked" if found.sha256 else f"{path}: of the right size; the hub says no checksum")
    return path


def _watched(progress: Callable[[int, int], None]) -> type:
    """A tqdm bar that reports instead of printing."""
    from huggingface_hub.utils import tqdm

    class Watched(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"disable": False, "file": io.StringIO()})

        def update(self, n=1):
            super().update(n)
            progress(int(self.n), int(self.total or 0))

    return Watched


def _unreachable(name: str, repo: str, error: Exception) -> CheckpointError:
    file = f"{name}-{KNOWN[name]}.pth" if name in KNOWN else f"the newest {name}-….pth"
    return CheckpointError(
        f"the hub cannot be reached ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})", where=name,
        fix=f"try again (a download goes on where it stopped), set HF_ENDPOINT to a mirror, or on another machine take "
            f"{file} from {repo} on huggingface.co, put it into models/ and give its path as load_model")
