"""Compiling the kernels of cuda/ on first use: once per machine, behind a lock, with a line that says so.

A built library lies in the user's cache directory under a name made of everything it depends on: the sources,
torch's version, the flags, this CPU's features and the compiler. So a home directory shared by several machines
never serves one the other's instructions, and where no compiler is found any more, a built one still loads.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from ..errors import KernelError

# No -ffast-math: a library linked with it can switch off denormal numbers in the whole process.
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp")
SOURCES = ("wkv7_cpu.cpp", "wkv6_cpu.cpp")
INSTALL = ("install a C++ compiler (Debian, Ubuntu, WSL: sudo apt install g++ · conda: conda install -c conda-forge "
           "gxx) and start the notebook's kernel again")


def load_cpu_kernels() -> None:
    """Make torch.ops.rwkv_nb's CPU kernels available, compiling them if this machine has not yet.

    Raises KernelError with the reason and the fix, again at once if it failed before in this process.
    """
    error = _load_once()
    if error is not None:
        raise KernelError(error.what, where=error.where, fix=error.fix)


def compiler_info() -> dict:
    """What would compile, and what is there: {"compiler": path or "", "version": its first line, "ninja": bool,
    "library": the built file or "", "flags": str}. Compiles nothing."""
    library = _built()
    return {"compiler": _compiler() or "", "version": _compiler_version(), "ninja": _ninja_folder() is not None,
            "library": str(library or ""), "flags": " ".join(FLAGS)}


def source_folder() -> Path:
    """cuda/, beside the package in a checkout and inside it in an installed wheel."""
    package = Path(__file__).parents[1]
    for folder in (package / "cuda", package.parent / "cuda"):
        if (folder / SOURCES[0]).is_file():
            return folder
    raise KernelError("the kernels' sources are missing", where=str(package / "cuda"), fix="install rwkv_nb again")


def library_name() -> str:
    """Name of the library that this compiler builds, without its suffix."""
    return f"{_stem()}-{_digest(_compiler_version())}"


def cache_folder() -> Path:
    """Where built libraries are kept: the platform's cache directory for this user."""
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "rwkv_nb"


@functools.cache
def _load_once() -> KernelError | None:
    try:
        library = _built()
        if library is None:
            _build_locked()
        else:
            torch.ops.load_library(library)
    except KernelError as error:
        return error
    except OSError as error:
        return KernelError(f"the C++ kernels cannot be kept or read: {error}", where=str(cache_folder()),
                           fix="make this folder writable with some room left")
    return None


def _build_locked() -> None:
    """Build and load, or wait for the process that is building and load what it built."""
    name = library_name()
    cache_folder().mkdir(parents=True, exist_ok=True)
    with open(cache_folder() / f"{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # gone with its process, however that ends
        library = _built()
        if library is None:
            _build(name)
        else:
            torch.ops.load_library(library)


def _build(name: str) -> None:
    compiler = _compiler()
    if not compiler:
        raise KernelError("no C++ compiler was found", fix=INSTALL)
    folder = cache_folder() / f"{name}.build"
    shutil.rmtree(folder, ignore_errors=True)  # half a build of a process that died, with torch's own lock file
    folder.mkdir()
    print(f"rwkv_nb: compiling the C++ WKV kernels with {_compiler_version()} (once per machine, usually under a "
          "minute) …", file=sys.stderr, flush=True)
    start = time.monotonic()
    try:
        from torch.utils import cpp_extension
        with _ninja_on_path():
            cpp_extension.load("rwkv_nb_cpu", [str(source_folder() / s) for s in SOURCES], extra_cflags=list(FLAGS),
                               extra_ldflags=["-fopenmp"], build_directory=str(folder), with_cuda=False,
                               is_python_module=False)
    except (RuntimeError, ImportError, subprocess.SubprocessError) as error:
        raise KernelError(f"the C++ kernels did not compile:\n{_last_words(error)}", where=compiler,
                          fix=INSTALL) from None
    os.replace(folder / "rwkv_nb_cpu.so", cache_folder() / f"{name}.so")
    shutil.rmtree(folder, ignore_errors=True)
    print(f"rwkv_nb: ready after {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def _last_words(error: Exception) -> str:
    """The end of what the compiler said, without the command lines of ninja."""
    said = getattr(error, "output", None) or str(error)
    said = said.decode(errors="replace") if isinstance(said, bytes) else said
    return "\n".join([line for line in said.strip().splitlines() if len(line) < 300][-12:])


def _built() -> Path | None:
    """The library for this compiler; where there is none, one that any compiler built for the rest of the key."""
    if _compiler():
        library = cache_folder() / f"{library_name()}.so"
        return library if library.is_file() else None
    return max(cache_folder().glob(f"{_stem()}-*.so"), key=lambda p: p.stat().st_mtime, default=None)


@functools.cache
def _stem() -> str:
    folder = source_folder()
    sources = b"".join(p.read_bytes() for p in [*map(folder.joinpath, SOURCES), *sorted(folder.glob("*.h"))])
    return "wkv_cpu-" + _digest(sources, torch.__version__, " ".join(FLAGS), _cpu())


def _cpu() -> str:
    """What -march=native means here."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        keys = ("flags", "Features", "model", "cpu family", "vendor_id", "CPU part")
        return "\n".join(sorted({line for line in lines if line.split(":")[0].strip() in keys}))
    return platform.machine() + platform.processor()


def _digest(*parts: str | bytes) -> str:
    return hashlib.sha256(b"\0".join(p if isinstance(p, bytes) else p.encode() for p in parts)).hexdigest()[:12]


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))  # as torch's cpp_extension chooses it


@functools.cache
def _compiler_version() -> str:
    """First line of `c++ --version`, "" where there is none."""
    if not _compiler():
        return ""
    try:
        out = subprocess.run([_compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return out.splitlines()[0] if out else ""


def _ninja_folder() -> str | None:
    with contextlib.suppress(ImportError):
        import ninja
        return ninja.BIN_DIR
    found = shutil.which("ninja")
    return str(Path(found).parent) if found else None


@contextlib.contextmanager
def _ninja_on_path():
    """The environment's ninja is on PATH only where the environment is activated; torch calls it by name."""
    before, folder = os.environ.get("PATH", ""), _ninja_folder()
    if folder:
        os.environ["PATH"] = os.pathsep.join(filter(None, (folder, before)))
    try:
        yield
    finally:
        os.environ["PATH"] = before
