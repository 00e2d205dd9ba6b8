"""What this machine has for fine-tuning, line by line, each good or with its mend. Notebook 00 shows it."""

import html
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from packaging.requirements import Requirement

from .quant import Held
from .runs import free_bytes
from .wkv import compiler_info, self_test
from .wkv.nvcc import find_nvcc


class Finding(NamedTuple):
    """One line: what was looked at, what is there, and what to do about it ("" when it is good)."""

    name: str
    found: str
    mend: str = ""
    needed: bool = True   # False: everything works without it, only slower


class Report(tuple[Finding, ...]):
    """Findings, shown as a coloured table in a notebook and as lines in a terminal."""

    @property
    def everything_needed(self) -> bool:
        """True when nothing that is needed is missing."""
        return not any(f.mend and f.needed for f in self)

    def __repr__(self) -> str:
        lines, width = [], max(len(f.name) for f in self)
        for f in self:
            lines.append(f"{_mark(f)} {f.name:{width}}  {f.found}")
            if f.mend:
                lines.append(f"  {'':{width}}  → {f.mend}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        colours = {"✓": "#188038", "✗": "#c5221f", "!": "#b06000"}
        rows = []
        for f in self:
            mend = f"<br>→ <b>{html.escape(f.mend)}</b>" if f.mend else ""
            rows.append(f'<tr style="text-align:left"><td style="color:{colours[_mark(f)]};font-weight:bold">{_mark(f)}'
                        f'</td><td style="text-align:left">{html.escape(f.name)}</td>'
                        f'<td style="text-align:left">{html.escape(f.found)}{mend}</td></tr>')
        return f"<table>{''.join(rows)}</table>"


def _mark(finding: Finding) -> str:
    if not finding.mend:
        return "✓"
    return "✗" if finding.needed else "!"


def check_machine(folder: str | Path = ".", *, disk_gb: float = 2, memory_gb: float = 2) -> Report:
    """Look at everything that fine-tuning uses; the first time this compiles the C++ kernel (some seconds).

    folder: where the runs will be written. disk_gb, memory_gb: what must be free there, and of memory, in 10⁹ bytes.
    """
    python = Finding("Python", f"{platform.python_version()} in {Path(sys.prefix).name}")
    return Report([python, *_packages(), _system(Path(folder).resolve()), _cores(), _memory(memory_gb),
                   _disk(Path(folder), disk_gb), _gpu(), _compiler(), _nvcc(), *_kernels(), _quant()])


def _packages() -> Iterator[Finding]:
    """One line for each package that pyproject.toml asks for, extras left out."""
    for text in importlib.metadata.requires("rwkv_nb") or ():
        requirement = Requirement(text)
        if requirement.marker is not None:
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        fits = version[0].isdigit() and requirement.specifier.contains(version, prereleases=True)
        mend = "" if fits else f"{requirement.specifier} is needed: run `make lab`, which installs it"
        yield Finding(requirement.name, version, mend)


def _system(folder: Path) -> Finding:
    found, mend = f"{platform.system()} {platform.machine()}", ""
    if "microsoft" in platform.release().lower():
        found += ", WSL"
        if folder.is_relative_to("/mnt"):
            mend = "this folder is on the Windows drive, slow from WSL: clone into your Linux home"
    return Finding("System", found, mend, needed=False)


def _cores() -> Finding:
    return Finding("CPU", f"{len(os.sched_getaffinity(0))} cores, torch uses {torch.get_num_threads()} threads, "
                          f"{torch.backends.cpu.get_cpu_capability()}")


def _memory(least: float) -> Finding:
    total, free, *_ = (n / 1e9 for n in psutil.virtual_memory())
    return Finding("Memory", f"{free:.1f} of {total:.1f} GB free",
                   "" if free >= least else f"close other programs: {least:g} GB should be free")


def _disk(folder: Path, least: float) -> Finding:
    free = free_bytes(folder) / 1e9
    return Finding("Disk", f"{free:.1f} GB free in this folder",
                   "" if free >= least else f"make room: {least:g} GB should be free, real models need more")


def _gpu() -> Finding:
    """GPUs that torch can use, or why there is none."""
    if torch.cuda.is_available():
        driver = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        found = [f"{card.name}, {card.total_memory / 1e9:.0f} GB" for card in cards]
        if driver:
            found.append(f"driver {driver}")
        return Finding("GPU", "; ".join(found))
    there = _first_line("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    if not there:
        return Finding("GPU", "none: the CPU is used")
    why = "this torch is a build for the CPU: install one for CUDA"
    if torch.version.cuda:
        why = f"torch is built for CUDA {torch.version.cuda}: update the driver, or install a torch for an older CUDA"
    return Finding("GPU", f"{there} is here, but torch cannot use it", why, needed=False)


def _compiler() -> Finding:
    info = compiler_info()
    if not info["compiler"]:
        return Finding("C++ compiler", "none: the chunked PyTorch form is used, which is slower", needed=False,
                       mend="Debian, Ubuntu, WSL: sudo apt install g++ · conda: conda install -c conda-forge gxx")
    return Finding("C++ compiler", info["version"])


def _nvcc() -> Finding:
    """The CUDA compiler, and whether it comes from the system, conda or pip."""
    nvcc = find_nvcc()
    if nvcc:
        return Finding("CUDA compiler", f"nvcc {nvcc.version}, from {nvcc.source}")
    if not torch.cuda.is_available():
        return Finding("CUDA compiler", "none, and no GPU that needs one", needed=False)
    return Finding("CUDA compiler", "none: slower kernels are used",
                   "pip install 'rwkv_nb[cuda]' · conda install -c conda-forge cuda-nvcc", needed=False)


def _kernels() -> Iterator[Finding]:
    """Every way to compute WKV-7, -6 and -5 here against the definition in float64; kernels are built if need be."""
    tests = [("", test) for test in self_test()]
    if torch.cuda.is_available():
        tests += [(" on the GPU", test) for test in self_test(("chunked", "triton", "cuda"), "cuda")]
    for where, (op, error, right, why_not) in tests:
        if why_not:
            yield Finding(f'WKV "{op}"{where}', "cannot run here", why_not, needed=False)
        else:
            yield Finding(f'WKV "{op}"{where}', f"self-test: largest error {error:.0e}",
                          "" if right else "it computes wrong numbers: use another op, and please report it")


def _quant() -> Finding:
    """Whether a matrix can be held in int8 and nf4 here, by doing it."""
    W = torch.randn(64, 64, device="cuda" if torch.cuda.is_available() else "cpu")
    try:
        for kind in ("int8", "nf4"):
            Held(W, kind, dtype=W.dtype).dense()
    except Exception as error:  # beside a missing package: one that was built for another CUDA
        return Finding("Quantised base", f"int8 and nf4 cannot be used here: {str(error).splitlines()[0]}",
                       "pip install 'rwkv_nb[quant]'", needed=False)
    return Finding("Quantised base", f"int8 and nf4, by bitsandbytes {importlib.metadata.version('bitsandbytes')}")


def _first_line(*command: str) -> str:
    """The first line that a program prints, "" when it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else ""
