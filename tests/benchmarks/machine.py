"""What a result was measured on, without anything that names the machine's owner or place."""

import os
import platform
from pathlib import Path

import torch

FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")  # those that decide the speed


def describe() -> dict:
    """{"cpu", "cores", "flags", "system", "python", "torch", "threads", "load"}: processor model and its features that
    matter here, cores given to this process, torch's threads, and the load average just before (idle: near 0)."""
    info = _cpuinfo()
    features = set((info.get("flags") or info.get("Features") or "").split())
    return {"cpu": info.get("model name") or platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)), "flags": [flag for flag in FLAGS if flag in features],
            "system": f"{platform.system()} {platform.machine()}", "python": platform.python_version(),
            "torch": torch.__version__, "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 2)}


def _cpuinfo() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.is_file() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
