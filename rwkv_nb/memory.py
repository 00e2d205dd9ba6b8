"""Bytes before a run: the real model takes a step without numbers, and every tensor that would live is counted.

A block more costs the same each time, so three and four blocks are computed and the rest follows.
Axes: B batch, T time, C channels, V vocabulary.
"""

import dataclasses
import functools
import threading
import weakref
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from . import config
from .config import LiveSettings, LoraSettings, Settings, TrainSettings
from .errors import SettingsError
from .lora.layers import adapter_parameters, attach, lora_layers, set_dropout_step
from .loss import CHUNK, GPU_CHUNK, SLICE
from .model import DTYPES, RWKV, Shape, State
from .quant import HEAD_ROWS, Held, QuantLinear
from .wkv import pick_op
from .wkv.kernels import meta_as_gpu, room_of

CONTEXT = 500_000_000     # what CUDA, or Python with torch, takes for itself
ADAM_BYTES = {"fp32": 8.0, "bf16": 4.0, "8bit": 2 + 8 / 256}
ADAM_AT_ONCE = 2**21      # trained numbers that bf16's step moves together, with 14 bytes each beside them
TRACED = ("precision", "grad_cp", "quant", "quant_double", "micro_bsz", "op")  # what a block's bytes follow from
# GB on an RTX 4090 as RWKV's LoRA tutorial publishes them: bf16, int8, nf4; r 64, ctx_len 1024, micro_bsz 1.
TUTORIAL = {"0.1B": (2.7, 2.5, 2.4), "0.4B": (3.4, 2.9, 2.7), "1.5B": (5.6, 4.6, 3.9), "2.9B": (8.8, 6.7, 5.7),
            "v6 1.6B": (7.3, 5.9, 5.4), "v6 3B": (11.8, 9.4, 8.1), "v6 7B": (23.7, 17.3, 14.9)}
TUTORIAL_SETTINGS = config.replace(Settings(), precision="bf16", ctx_len=1024, r=64, lora_alpha=32.0, lora_dropout=0.05)
QUANTS = ("none", "int8", "nf4")
_tracing = threading.Lock()  # what meta stands for is the same for all threads; and who asks the same waits for it


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations inside the block bring to life: `.now` and `.peak`."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor):
                self.count(tensor)
        room = room_of(function, args)
        if room:
            self.born(0, room)
            self.freed(0, room)
        return out

    def count(self, tensor: torch.Tensor) -> None:
        """Take a tensor's storage in; it leaves when nothing refers to it any more."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or not size:
            return

        def gone(_):
            del self._seen[key]
            self.freed(key, size)

        self._seen[key] = weakref.ref(storage, gone)
        self.born(key, size)

    def born(self, key: int, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def freed(self, key: int, size: int) -> None:
        self.now -= size


@dataclass(frozen=True)
class Estimate:
    """Bytes by part: the most that each ever takes, and what it takes at the moment when all together take most."""

    largest: dict[str, int]
    at_peak: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes at the peak, the context included."""
        return sum(self.at_peak.values())

    @property
    def allocated(self) -> int:
        """Bytes at the peak that torch's allocator shows."""
        return self.total - CONTEXT


def estimate(shape: Shape, settings: Settings, *, gpu: bool = True) -> Estimate:
    """The memory of a run on a base of this shape, on each GPU or (gpu=False) in a CPU's memory. Takes about a second,
    and no time when asked again. Raises SettingsError as a run would for targets that fit nothing, and for a
    micro-batch of more numbers than torch can count."""
    t, live = dataclasses.replace(settings.train, micro_bsz=rows(settings)), settings.train.live
    T = min(settings.data.ctx_len, t.chunk_ctx or settings.data.ctx_len)
    chunked, joined = T < settings.data.ctx_len, t.devices * t.num_nodes > 1
    accumulates = chunked or live.accumulate_grad_batches > 1
    traced = TrainSettings(
        **{name: getattr(t, name) for name in TRACED}, chunk_ctx=T * chunked,
        live=LiveSettings(accumulate_grad_batches=1 + accumulates, lora_dropout=live.lora_dropout))
    n = min(shape.n_layer, 4)  # from the fourth on, a block more brings the same to the peak, whatever moment that is
    try:
        with _tracing:
            fewer, few = (_step(dataclasses.replace(shape, n_layer=max(m, 1), vocab_size=1), settings.lora, T, gpu,
                                traced) for m in (n - 1, n))
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise SettingsError(f"a micro-batch of {t.micro_bsz:,} × {T:,} tokens is more than torch can count",
                            where="micro_bsz × ctx_len", fix="lower ctx_len or micro_bsz") from error
    each = {key: few[key] - fewer[key] for key in few}
    whole = {key: few[key] + (shape.n_layer - n) * each[key] for key in few}
    V, C, itemsize, trained = shape.vocab_size, shape.n_embd, DTYPES[t.precision].itemsize, whole["lora"]
    weights = whole["weights"] + V * C * itemsize * (not (gpu and t.emb_cpu))
    weights += V * (C + itemsize) if t.quant_head else V * C * itemsize
    largest = {"weights": weights, "LoRA": trained, "gradients": trained,
               "optimizer": round(trained / 4 * ADAM_BYTES[t.adam_state]), "checkpoints": whole["forward"],
               "block peak": whole["backward"] - max(whole["forward"], trained * (not accumulates)),
               "loss": _loss_bytes(shape, T, t, gpu), "context": CONTEXT + (_workspaces() if gpu else 0)}
    # Backward frees checkpoints and brings gradients, block by block: whichever is more a block says where the peak is.
    at_top = accumulates or each["forward"] > each["lora"]
    moments = [{"gradients": trained * accumulates, "checkpoints": whole["forward"], "loss": largest["loss"]},
               {"gradients": trained if accumulates or not at_top else 0, "checkpoints": whole["forward"] * at_top},
               {"gradients": trained, "block peak": trained * joined},  # summed over processes in one flat copy
               {"gradients": trained,
                "block peak": 14 * min(trained // 4, ADAM_AT_ONCE) * (t.adam_state == "bf16")}]
    moments[1]["block peak"] = whole["backward"] + trained * accumulates - sum(moments[1].values())
    moment = dict.fromkeys(("gradients", "checkpoints", "block peak", "loss"), 0) | max(
        moments, key=lambda parts: sum(parts.values()))
    return Estimate(largest, largest | moment)


def rows(settings: Settings) -> int:
    """Rows of a micro-batch: with dataload "only" one, whatever micro_bsz says."""
    return 1 if settings.data.dataload == "only" else settings.train.micro_bsz


def _workspaces() -> int:
    """Bytes that torch allocates for cuBLAS: for forward's thread and for autograd's. Which GPUs get 32 MiB each is
    another matter in each version of torch: from 2.13 on it says so."""
    if not torch.cuda.is_available():
        return 2 * (2**23 + 2**17)
    torch.cuda.init()
    if hasattr(torch.backends.cuda, "cublas_workspace_size"):
        return 2 * torch.backends.cuda.cublas_workspace_size()
    return 2 * (2**25 if torch.cuda.get_device_capability()[0] >= 9 else 2**23 + 2**17)


def numberless(shape: Shape, lora: LoraSettings, t: TrainSettings, gpu: bool) -> RWKV:
    """The model of a run, on a GPU or not, with its adapter, on device meta: sizes without numbers. Its head is as the
    base's."""
    model = RWKV(shape, dtype=DTYPES[t.precision])
    for name, module in list(model.blocks.named_modules()) if t.quant != "none" else ():
        if isinstance(module, nn.Linear):
            model.blocks.set_submodule(name, QuantLinear(_Sizes(module, t.quant, bool(t.quant_double))))
    attach(model, lora, seed=0)
    set_dropout_step(model.train(), 0, 0, 0, t.live.lora_dropout)
    for layer in lora_layers(model).values():
        layer.clock.masks = gpu
    return model


@functools.lru_cache(4096)
def _step(shape: Shape, lora: LoraSettings, T: int, gpu: bool, t: TrainSettings) -> dict:
    """Forward and backward of a small model without numbers. Bytes: weights (of emb and head none), lora; forward:
    activations that are kept for backward; backward: the most of activations and new gradients together."""
    dtype, B, C = DTYPES[t.precision], t.micro_bsz, shape.n_embd
    op = pick_op(t.op if t.op in ("torch", "chunked") else "auto", "cpu", dtype, shape.generation)
    state = after = None
    as_there = meta_as_gpu() if gpu and op == "cpu" else nullcontext()
    with torch.device("meta"), as_there, LiveBytes() as live:
        model = numberless(shape, lora, t, gpu)
        parameters = list(adapter_parameters(model))
        trained = sum(p.nbytes for p in parameters)
        weights = live.now - trained - 2 * C * dtype.itemsize  # emb and head are counted on their own
        for p in parameters if t.live.accumulate_grad_batches > 1 else ():
            p.grad = torch.zeros_like(p)
        before = live.now
        tokens = torch.zeros(B, T, dtype=torch.long)
        if t.chunk_ctx:  # the state before a chunk, and the gradient of the one behind it
            state, after = (State(*(part.requires_grad_() for part in model.zero_state(B))) for _ in range(2))
        hidden, kept = model.hidden(tokens, state, op=op, grad_cp=t.grad_cp, keep_state=bool(t.chunk_ctx))
        forward, live.peak = live.now - before, live.now
        ends = [(hidden, torch.empty_like(hidden)), *zip(kept or (), after or (), strict=True)]
        torch.autograd.backward(*zip(*(end for end in ends if end[0].requires_grad), strict=True))
        backward = live.peak - before
    return {"weights": weights, "lora": trained, "forward": forward, "backward": backward}


class _Sizes(Held):
    """A held matrix without numbers."""

    def __init__(self, like: nn.Linear, kind: str, double: bool):
        W, self.kind = like.weight, kind
        self.shape, self.dtype, self.device = W.shape, W.dtype, W.device
        n, rows = W.numel(), like.out_features
        scales = rows * self.dtype.itemsize if kind == "int8" else n // 64 + n // 4096 if double else n // 16
        self.codes = torch.empty((n if kind == "int8" else n // 2) + scales, dtype=torch.uint8)

    def dense(self, rows: slice = slice(None)) -> torch.Tensor:
        scales = self.codes.new_empty(self.codes.numel() // 8 if self.kind == "nf4" else 0)  # in fp32
        dense = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        del scales
        return dense


def _loss_bytes(shape: Shape, T: int, t: TrainSettings, gpu: bool) -> int:
    """What head_loss needs beside the hidden states: their copy and gradient, logits of some rows, and on a CPU fp32
    copies of fewer."""
    V, C, itemsize = shape.vocab_size, shape.n_embd, DTYPES[t.precision].itemsize
    tokens = t.micro_bsz * T
    rows = min(GPU_CHUNK if gpu else CHUNK, tokens)
    fp32 = 0 if gpu else min(max(SLICE // V, 1), rows) * V * (4 if itemsize == 4 else 8)
    head = min(HEAD_ROWS, V) * C * itemsize if t.quant_head else 0
    return 2 * tokens * C * itemsize + rows * V * itemsize + max(fp32, head)
