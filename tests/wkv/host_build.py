"""The GPU's kernels compiled for the CPU (host.h), with the operators that they are registered under."""

import subprocess
from pathlib import Path

from torch.utils.cpp_extension import include_paths, library_paths

from rwkv_nb.wkv.build import source_folder

CUDA = source_folder()


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, cwd=CUDA.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def compile_on_host(folder, *names, sources=CUDA):
    """Path of the library made in `folder` of NAME_cuda.cpp and NAME_gpu.cu for each name; what was compiled of the
    first kind there before is kept."""
    includes = [f"-I{path}" for path in (Path(__file__).parent, sources, *include_paths())]
    flags = ["-std=c++20", "-O1", "-fPIC", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-DWKV_ON_HOST", *includes]
    objects = []
    for name in names:
        objects += [folder / f"{name}_cuda.o", folder / f"{sources.name}-{name}_gpu.o"]
        if not objects[-2].exists():
            run("c++", *flags, "-c", sources / f"{name}_cuda.cpp", "-o", objects[-2])
        run("c++", *flags, "-x", "c++", "-c", sources / f"{name}_gpu.cu", "-o", objects[-1])
    library = folder / f"{sources.name}-{'-'.join(names)}.so"
    run("c++", "-shared", "-o", library, *objects, *(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10")
    return library
