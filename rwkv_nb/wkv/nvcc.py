"""The CUDA compiler, wherever it came from, and the GPU kernels that it builds on first use."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import KernelError
from .build import compile_cpp, digest, load_library, read_sources, remembered, source_folder

KERNELS = ("wkv_gpu.cu", "pointwise_gpu.cu", "loss_gpu.cu")
OPERATORS = ("wkv_cuda.cpp", "pointwise_cuda.cpp", "loss_cuda.cpp")
FLAGS = ("-O3", "-std=c++17", "-Xcompiler", "-fPIC")
INSTALL = ("install a CUDA compiler and start the notebook's kernel again (pip install 'rwkv_nb[cuda]' · conda install "
           "-c conda-forge cuda-nvcc · your system's CUDA toolkit), or use op \"triton\", which needs none")


class Nvcc(NamedTuple):
    """A CUDA compiler."""

    path: Path
    source: str   # "system", "conda" or "pip"
    version: str  # such as "13.0.88"

    def root(self) -> Path:
        """The folder of its toolkit, by its own word: what lies on PATH may be a script that calls it."""
        call = [self.path, "--dryrun", "-c", source_folder() / KERNELS[0]]
        top = re.search(r"TOP=(.*)", subprocess.run(call, capture_output=True, text=True).stderr)
        return Path(top[1].strip()).resolve() if top else self.path.parents[1]

    def compile(self, output: Path, *flags: str) -> str:
        """Compile the kernels to output/*.o; returns what nvcc said. Raises KernelError with its words."""
        sources = [source_folder() / kernel for kernel in KERNELS]
        done = subprocess.run([self.path, *FLAGS, *flags, "-c", *sources, "--output-directory", output],
                              text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            raise KernelError(f"the GPU kernels did not compile:\n{done.stdout[-2000:]}", where=self.path, fix=INSTALL)
        return done.stdout


def find_nvcc(cuda: str | None = None) -> Nvcc | None:
    """The compiler to use: the first of system, conda and pip's packages of the major version of `cuda` (by default
    torch's, "13.0"); where none has it, the first. None where there is none."""
    major = (cuda or torch.version.cuda or "").split(".")[0]
    found = [nvcc for nvcc in map(_look, _places()) if nvcc]
    return min(found, key=lambda nvcc: nvcc.version.split(".")[0] != major, default=None)


@remembered
def load_cuda_kernels() -> None:
    """Give torch.ops.rwkv_nb its kernels for this machine's GPUs, compiling them if it has not yet.

    Raises KernelError with the reason and the fix, again at once if it failed before in this process.
    """
    if not torch.cuda.is_available():
        raise KernelError("torch sees no GPU", where="op", fix="00_check says why")
    build_for(sorted({"sm_{}{}".format(*torch.cuda.get_device_capability(i))
                      for i in range(torch.cuda.device_count())}))


def build_for(architectures: list[str]) -> None:
    """Load the GPU kernels for architectures such as "sm_90" from the cache, compiling them first if need be."""
    nvcc = find_nvcc()
    stem = "wkv_cuda-" + digest(read_sources("*.cu*", "*gpu*.h", *OPERATORS), torch.__version__, *FLAGS,
                                *architectures)
    load_library(stem, nvcc.version if nvcc else "", lambda folder: _build(nvcc, architectures, folder))


def _build(nvcc: Nvcc | None, architectures: list[str], folder: Path) -> None:
    if not nvcc:
        raise KernelError("no CUDA compiler was found", fix=INSTALL)
    print(f"rwkv_nb: compiling the GPU WKV kernels with nvcc {nvcc.version} ({nvcc.source}) for "
          f"{', '.join(architectures)} (once per machine, usually under a minute) …", file=sys.stderr, flush=True)
    nvcc.compile(folder, *_gencode(architectures))
    compile_cpp("rwkv_nb_cuda", OPERATORS, folder, ("-O2",), [*map(str, folder.glob("*.o")), *link_flags(nvcc)])


def _gencode(architectures: list[str]) -> list[str]:
    """nvcc's flags. Most of its time goes into what a family of GPUs (sm_80, 86, 89) can share."""
    families: dict[str, list[str]] = {}
    for name in architectures:
        families.setdefault("75" if name == "sm_75" else f"{name[3:-1]}0", []).append(name)
    return [f"-gencode=arch=compute_{family},code=[{','.join(names)}]" for family, names in families.items()]


def link_flags(nvcc: Nvcc) -> list[str]:
    """What the linker needs beside the objects."""
    places = [f"-L{nvcc.root() / place}" for place in ("targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "lib64",
                                                       "lib")]
    torchs = ["-Wl,--no-as-needed", "-ltorch_cuda"] if torch.version.cuda else []  # the current stream's function
    return [*places, "-lcudart_static", "-lrt", "-ldl", "-lpthread", *torchs]


def _places() -> Iterator[tuple[str, Path]]:
    """Where an nvcc may lie, in the order of choice: (source, path)."""
    conda = [Path(p) for p in (os.environ.get("CONDA_PREFIX"), sys.prefix) if p]
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home:
            yield "system", Path(home) / "bin" / "nvcc"
    on_path = shutil.which("nvcc")
    if on_path:
        yield ("conda" if any(Path(on_path).is_relative_to(p) for p in conda) else "system"), Path(on_path)
    yield "system", Path("/usr/local/cuda/bin/nvcc")
    for prefix in conda:
        yield "conda", prefix / "bin" / "nvcc"
    spec = importlib.util.find_spec("nvidia")  # a namespace of many packages, which none of them owns
    for folder in sorted(spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("*/bin/nvcc"), reverse=True):
            yield "pip", path


def _look(place: tuple[str, Path]) -> Nvcc | None:
    source, path = place
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    version = re.search(r"V(\d+\.\d+\.\d+)", said)
    return Nvcc(path, source, version[1]) if version else None
