"""The GPU's kernels compiled for the CPU (host.h), with the operators that they are registered under."""

import fcntl
import os
import subprocess
from pathlib import Path

from torch.utils.cpp_extension import include_paths, library_paths

from rwkv_nb.wkv.build import source_folder

CUDA = source_folder()


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, cwd=CUDA.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def compile_on_host(tmp_path_factory, *names, sources=CUDA):
    """Path of the library made of NAME_cuda.cpp and NAME_gpu.cu for each name. An object file is compiled once, for all
    of pytest-xdist's processes; sources: a folder whose name is its own, of which the second kind is taken."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "host"
    folder.mkdir(exist_ok=True)
    includes = [f"-I{path}" for path in (Path(__file__).parent, sources, *include_paths())]
    flags = ["-std=c++20", "-O1", "-fPIC", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-DWKV_ON_HOST", *includes]
    objects, library = [], folder / f"{sources.name}-{'-'.join(names)}.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in names:
            for made, source in ((f"{name}_cuda.o", [sources / f"{name}_cuda.cpp"]),
                                 (f"{sources.name}-{name}_gpu.o", ["-x", "c++", sources / f"{name}_gpu.cu"])):
                objects.append(folder / made)
                if not objects[-1].exists():
                    run("c++", *flags, "-c", *source, "-o", objects[-1])
        places = [f"-L{path}" for path in library_paths()]
        run("c++", "-shared", "-o", library, *objects, *places, "-ltorch_cpu", "-lc10")
    return library
