"""Compiling the kernels of cuda/ on first use: once per machine, behind a lock, with a line that says so.

A built library lies in the user's cache directory under a name made of everything it depends on: the sources,
torch's version, the flags, this CPU's features and the compiler. So a home directory shared by several machines
never serves one the other's instructions, and where no compiler is found any more, a built one still loads.
"""

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
from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import KernelError

# No -ffast-math: a library linked with it can switch off denormal numbers in the whole process.
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp")
SOURCES = ("wkv_cpu.cpp", "token7_cpu.cpp")
INSTALL = ("install a C++ compiler (Debian, Ubuntu, WSL: sudo apt install g++ · conda: conda install -c conda-forge "
           "gxx) and start the notebook's kernel again")


def remembered(load):
    """`load` once a process; a KernelError, into which an OSError is made, is raised again at once."""
    @functools.cache
    def outcome() -> KernelError | None:
        try:
            load()
        except KernelError as error:
            return error
        except OSError as error:
            return KernelError(f"the kernels cannot be kept or read: {error}", where=str(cache_folder()),
                               fix="make this folder writable with some room left")
        return None

    @functools.wraps(load)
    def again() -> None:
        error = outcome()
        if error is not None:
            raise KernelError(error.what, where=error.where, fix=error.fix)
    return again


@remembered
def load_cpu_kernels() -> None:
    """Make torch.ops.rwkv_nb's CPU kernels available, compiling them if this machine has not yet.

    Raises KernelError with the reason and the fix, again at once if it failed before in this process.
    """
    load_library(_stem(), _compiler_version(), _build_cpu)


def compiler_info() -> dict:
    """What would compile, and what is there: {"compiler": path or "", "version": its first line, "ninja": bool,
    "library": the built file or "", "flags": str}. Compiles nothing."""
    library = built(_stem(), _compiler_version())
    return {"compiler": _compiler() or "", "version": _compiler_version(), "ninja": _ninja_folder() is not None,
            "library": str(library or ""), "flags": " ".join(FLAGS)}


def source_folder() -> Path:
    """cuda/, beside the package in a checkout and inside it in an installed wheel."""
    package = Path(__file__).parents[1]
    for folder in (package / "cuda", package.parent / "cuda"):
        if (folder / SOURCES[0]).is_file():
            return folder
    raise KernelError("the kernels' sources are missing", where=str(package / "cuda"), fix="install rwkv_nb again")


def cache_folder() -> Path:
    """Where built libraries are kept: the platform's cache directory for this user."""
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "rwkv_nb"


def load_library(stem: str, compiler: str, build: Callable[[Path], None]) -> None:
    """Load a library of the cache; where it is not there yet, build(folder) makes it, the one *.so of that folder,
    and loads it, once for all processes that want it.

    stem: names all that the library depends on but the compiler. compiler: the compiler's version, "" for none: then
    one that any compiler built will do. Raises what `build` raises, and OSError.
    """
    library = built(stem, compiler)
    if library is not None:
        torch.ops.load_library(library)
        return
    library = cache_folder() / f"{stem}-{digest(compiler)}.so"
    cache_folder().mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # gone with its process, however that ends
        if library.is_file():
            torch.ops.load_library(library)
            return
        folder = library.with_suffix(".build")
        shutil.rmtree(folder, ignore_errors=True)  # half a build of a process that died, with torch's own lock file
        folder.mkdir()
        start = time.monotonic()
        build(folder)
        os.replace(next(folder.glob("*.so")), library)
        shutil.rmtree(folder, ignore_errors=True)
        print(f"rwkv_nb: ready after {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def built(stem: str, compiler: str) -> Path | None:
    """The library for this compiler; where there is none (""), one that any compiler built for the stem."""
    if compiler:
        library = cache_folder() / f"{stem}-{digest(compiler)}.so"
        return library if library.is_file() else None
    return max(cache_folder().glob(f"{stem}-*.so"), key=lambda p: p.stat().st_mtime, default=None)


def compile_cpp(name: str, sources, folder: Path, flags=FLAGS, ldflags=("-fopenmp",)) -> None:
    """Compile C++ sources of cuda/ with torch's headers into folder/NAME.so, and load it. Raises KernelError."""
    if not _compiler():
        raise KernelError("no C++ compiler was found", fix=INSTALL)
    try:
        from torch.utils import cpp_extension
        with _ninja_on_path():
            cpp_extension.load(name, [str(source_folder() / s) for s in sources], extra_cflags=list(flags),
                               extra_ldflags=list(ldflags), build_directory=str(folder), with_cuda=False,
                               is_python_module=False)
    except (RuntimeError, ImportError, subprocess.SubprocessError) as error:
        raise KernelError(f"the C++ kernels did not compile:\n{_last_words(error)}", where=_compiler(),
                          fix=INSTALL) from None


def _build_cpu(folder: Path) -> None:
    if _compiler():
        print(f"rwkv_nb: compiling the C++ WKV kernels with {_compiler_version()} (once per machine, usually under a "
              "minute) …", file=sys.stderr, flush=True)
    compile_cpp("rwkv_nb_cpu", SOURCES, folder)


def _last_words(error: Exception) -> str:
    """The end of what the compiler said, without the command lines of ninja."""
    said = getattr(error, "output", None) or str(error)
    said = said.decode(errors="replace") if isinstance(said, bytes) else said
    return "\n".join([line for line in said.strip().splitlines() if len(line) < 300][-12:])


@functools.cache
def _stem() -> str:
    sources = read_sources(*SOURCES, "*cpu*.h", "wkv_tiles.h")
    return "wkv_cpu-" + digest(sources, torch.__version__, " ".join(FLAGS), _cpu())


def read_sources(*patterns: str) -> bytes:
    """The content of files of cuda/."""
    return b"".join(path.read_bytes() for pattern in patterns for path in sorted(source_folder().glob(pattern)))


def _cpu() -> str:
    """What -march=native means here."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        keys = ("flags", "Features", "model", "cpu family", "vendor_id", "CPU part")
        return "\n".join(sorted({line for line in lines if line.split(":")[0].strip() in keys}))
    return platform.machine() + platform.processor()


def digest(*parts: str | bytes) -> str:
    """A short name for all that a library depends on."""
    return hashlib.sha256(b"\0".join(p if isinstance(p, bytes) else p.encode() for p in parts)).hexdigest()[:12]


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))  # as torch's cpp_extension chooses it


@functools.cache
def _compiler_version() -> str:
    """First line of `c++ --version`, "" where there is none."""
    try:
        out = subprocess.run([_compiler() or "", "--version"], capture_output=True, text=True, check=True).stdout
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
