"""The Triton kernels in Triton's interpreter, on the CPU: prints a line of JSON a case, as on_host.py.

    TRITON_INTERPRET=1 python in_triton.py CASES
"""

import json
import sys

import torch
from on_host import errors

from rwkv_nb.wkv import triton_op

torch.set_num_threads(1)
ways = {7: triton_op.wkv7, 6: triton_op.wkv6, 5: triton_op.wkv5}
for case in json.loads(sys.argv[1]):
    print(json.dumps(errors(way=ways[case["version"]], **case)), flush=True)
