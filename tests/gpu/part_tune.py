"""Other shapes of the CUDA kernels beside the present ones, timed: which constants of wkv_gpu.cu are best on this GPU.

Each variant is cuda/ with some text replaced, compiled for this GPU alone, and loaded over the operators before it. All
are built side by side at the first case. The arithmetic stays as it is, which each case checks.
"""

import functools
import shutil
import subprocess
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from part_kernels import _both, _kernels, _leaves
from torch.utils.cpp_extension import include_paths, library_paths

from rwkv_nb.wkv import WKV, nvcc, pick_op
from rwkv_nb.wkv.build import source_folder

VARIANTS = {  # name: (file, text, what stands there instead)
    "as it is": (),
    "values: 64 threads, 4 lanes": (("wkv_gpu.cu", "LAUNCH(heads, 128, stream, (values<Real, Decay, 128, 8, 4,",
                                     "LAUNCH(heads, 64, stream, (values<Real, Decay, 64, 4, 4,"),),
    "values: two rows a thread": (("wkv_gpu.cu", "values<Real, Decay, 128, 8, 4,", "values<Real, Decay, 128, 4, 2,"),),
    "keys: 128 threads, two columns each": (("wkv_gpu.cu", "THREADS = sizeof(Real) == 2 ? 64 : 128", "THREADS = 128"),),
    "few below 64 heads": (("wkv_gpu.cu", "FEW = 128", "FEW = 64"),),
    "few below 256 heads": (("wkv_gpu.cu", "FEW = 128", "FEW = 256"),),
    "few below 600 heads": (("wkv_gpu.cu", "FEW = 128", "FEW = 600"),),
    "pieces for 256": (("wkv_gpu.h", "BUSY = 512", "BUSY = 256"),),
    "pieces for 1024": (("wkv_gpu.h", "BUSY = 512", "BUSY = 1024"),),
    "pieces for 2048": (("wkv_gpu.h", "BUSY = 512", "BUSY = 2048"),),
}
SHAPES = ((8, 4096, 64), (8, 1024, 32), (4, 1024, 32), (1, 1024, 32), (1, 1024, 12), (1, 4096, 40))


def cases(options):
    for name in VARIANTS if options.device == "cuda" else ():
        yield name, functools.partial(_variant, name)


def table(results) -> str:
    shapes = ["B{} T{} H{}".format(*size) for size in SHAPES]
    lines = [f"| WKV-7, bf16, kernels alone, ms | {' | '.join(shapes)} |", "|---" * (len(shapes) + 1) + "|"]
    return "\n".join(lines + [f"| {name} | {' | '.join(str(r.get(shape)) for shape in shapes)} |"
                              for name, r in results.items()])


def _variant(name) -> dict:
    way = functools.partial(WKV[7], op="cuda")
    pick_op("cuda", "cuda")
    leaves, dy = _leaves(7, 2, 100, 3, "cuda", torch.float32), torch.randn(2, 100, 3, 64, device="cuda")
    expected = _both(way, leaves, dy)
    torch.ops.load_library(_libraries()[name].result())
    found = _both(way, leaves, dy)
    right = all(torch.allclose(x, y, atol=1e-3, rtol=1e-3) for x, y in zip(found, expected, strict=True))
    times = {}
    for B, T, H in SHAPES:
        leaves, dy = _leaves(7, B, T, H, "cuda"), torch.randn(B, T, H, 64, device="cuda", dtype=torch.bfloat16)
        times[f"B{B} T{T} H{H}"] = _kernels(functools.partial(_both, way, leaves, dy))
    return {"ok": right} | times


@functools.cache
def _libraries() -> dict[str, Future]:
    """Every variant's library, or what it failed with: that costs the others nothing."""
    folder = Path(tempfile.mkdtemp())
    with ThreadPoolExecutor() as pool:
        return {name: pool.submit(build, folder, name) for name in VARIANTS}


def build(folder: Path, name: str, architecture: str = "") -> Path:
    """A variant's library, made in a new folder inside `folder`."""
    compiler, sources = nvcc.find_nvcc(), folder / name.replace(" ", "_").replace(":", "")
    shutil.copytree(source_folder(), sources)
    for file, text, other in VARIANTS[name]:
        whole = (sources / file).read_text()
        assert text in whole, f"{name}: {file} has no {text!r}"
        (sources / file).write_text(whole.replace(text, other))
    architecture = architecture or "sm_{}{}".format(*torch.cuda.get_device_capability())
    objects = [sources / "kernels.o", sources / "operators.o"]
    includes = [f"-I{path}" for path in include_paths()]
    _run(compiler.path, *nvcc.FLAGS, f"-arch={architecture}", "-c", sources / nvcc.KERNELS[0], "-o", objects[0])
    _run("c++", "-O2", "-std=c++20", "-fPIC", *includes, "-c", sources / "wkv_cuda.cpp", "-o", objects[1])
    _run("c++", "-shared", "-o", sources / "variant.so", *objects, *nvcc.link_flags(compiler),
         *(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10")
    return sources / "variant.so"


def _run(*command) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr[-2000:]}")
