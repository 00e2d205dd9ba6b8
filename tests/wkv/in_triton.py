"""The Triton kernels in Triton's interpreter, on the CPU: prints a line of JSON a case, as on_host.py. Before
that torch is asked whether they are sound as operators.

    TRITON_INTERPRET=1 python in_triton.py CASES
"""

import json
import sys

import torch
from on_host import errors

from rwkv_nb.wkv import triton_op
from rwkv_nb.wkv.selftest import realistic_inputs

torch.set_num_threads(1)
triton_op.load()
for *inputs, state in ([x.requires_grad_() for x in realistic_inputs(1, 3, 1, 16, version=v)] for v in (7, 6)):
    torch.library.opcheck(torch.ops.rwkv_nb.wkv_triton, (*inputs, *[None] * (6 - len(inputs)), state, True))
ways = {7: triton_op.wkv7, 6: triton_op.wkv6, 5: triton_op.wkv5}
for case in json.loads(sys.argv[1]):
    print(json.dumps(errors(way=ways[case["version"]], **case)), flush=True)
