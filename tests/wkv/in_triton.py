"""Triton's kernels, ours or fla's, in Triton's interpreter, on the CPU: prints a line of JSON a case, as on_host.py.
Before that torch is asked whether ours are sound as operators.

    TRITON_INTERPRET=1 python in_triton.py triton_op|fla_op CASES
"""

import importlib
import json
import sys

import torch
from on_host import errors
from triton.runtime.autotuner import Autotuner

from rwkv_nb.wkv.selftest import realistic_inputs

torch.set_num_threads(1)
Autotuner._bench = lambda *args, **kwargs: [0.0, 0.0, 0.0]  # nothing is timed here
op = importlib.import_module(f"rwkv_nb.wkv.{sys.argv[1]}")
op.load()
if sys.argv[1] == "triton_op":
    for *inputs, state in ([x.requires_grad_() for x in realistic_inputs(1, 3, 1, 16, version=v)] for v in (7, 6)):
        torch.library.opcheck(torch.ops.rwkv_nb.wkv_triton, (*inputs, *[None] * (6 - len(inputs)), state, True))
for case in json.loads(sys.argv[2]):
    print(json.dumps(errors(way=getattr(op, f"wkv{case['version']}"), **case)), flush=True)
