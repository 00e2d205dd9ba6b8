"""Runs as on a GPU (pretend_gpu.py), each stopped once and resumed; prints a line of JSON for each: {"status": …,
"called": which of our operators}. What they computed is in their folders.

    python on_pretend_gpu.py LIBRARY FOLDER CASES       LIBRARY: of host_build.py; CASES: {name: settings} in JSON
"""

import json
import sys
import time
from pathlib import Path

import pretend_gpu
import torch

from rwkv_nb.config import Settings, from_dict
from rwkv_nb.runs import Run
from rwkv_nb.train.session import TrainSession
from rwkv_nb.wkv import kernels

torch.set_num_threads(1)
kernels.load_cuda_kernels = lambda: torch.ops.load_library(sys.argv[1])
for name, values in json.loads(sys.argv[3]).items():
    pretend_gpu.called.clear()
    settings, prompts = from_dict(Settings, values), ["User: who?"]
    session = TrainSession(Run(Path(sys.argv[2]) / name), settings, prompts=prompts, max_tokens=3).start()
    while session.snapshot().step < 2 and not session.snapshot().done:
        time.sleep(0.01)
    session.stop()
    session.join()
    end = TrainSession(session.run, settings, prompts=prompts, max_tokens=3).start().join()
    print(json.dumps({"status": end.status, "called": sorted(pretend_gpu.called)}), flush=True)
