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


def compile_on_host(folder, operators, kernels, sources=CUDA):
    """Path of the library made in `folder` of two of the sources' files; operators compiled there before are kept."""
    includes = [f"-I{path}" for path in (Path(__file__).parent, sources, *include_paths())]
    flags = ["-std=c++20", "-O1", "-fPIC", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-DWKV_ON_HOST", *includes]
    registers, compiled = folder / f"{operators}.o", folder / f"{sources.name}-{kernels}.o"
    if not registers.exists():
        run("c++", *flags, "-c", sources / operators, "-o", registers)
    run("c++", *flags, "-x", "c++", "-c", sources / kernels, "-o", compiled)
    library = folder / f"{sources.name}-{kernels}.so"
    libraries = [f"-L{path}" for path in library_paths()]
    run("c++", "-shared", "-o", library, registers, compiled, *libraries, "-ltorch_cpu", "-lc10")
    return library
