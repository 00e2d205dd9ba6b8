"""The engine of a run: one object that holds model, data and optimizer, and takes one optimizer step at a time.

It knows no thread and no widget; train.session drives it.
"""

import contextlib
import dataclasses
import math
import resource
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..config import LiveSettings, Settings, TrainSettings, check_together
from ..data.batches import Batch, Batches
from ..data.sources import open_split
from ..errors import SettingsError, TrainingError
from ..evaluate import TEXTS, text_loss
from ..generate import generate
from ..lora.adapter import adapter_tensors, save_adapter, set_adapter_tensors
from ..lora.layers import adapter_parameters, attach, set_dropout_step, strength
from ..lora.merge import merge
from ..lora.meta import AdapterMeta
from ..lora.parts import trained_parts
from ..loss import head_loss
from ..memory import rows
from ..model import DTYPES, RWKV, fingerprint, load_model
from ..runs import Run
from ..tokenizer import get_tokenizer
from ..wkv import pick_op
from .before import check_shape, pick_device
from .checkpoint import Checkpoint
from .infctx import backward_by_chunks
from .log import Logs
from .ranks import Ranks
from .schedule import learning_rate
from .shrink import keep_freed_memory
from .update import Update
from .zero import DeepSpeedUpdate

SPIKE_WINDOW, MOST_SKIPS = 50, 10
_NOT_A_NUMBER = ("the last checkpoint is good: resume with a lower lr_init or a smaller grad_clip; "
                 "with precision bf16 or fp16, try fp32; on_spike=skip leaves such steps out")


def load_as_trained(t: TrainSettings, path: str | Path = "", device: torch.device | None = None) -> RWKV:
    """The base, or the model file at `path`, held as in a run under these settings: device, precision, quantisation."""
    return load_model(
        path or t.load_model, device=device or pick_device(t.accelerator), dtype=DTYPES[t.precision], quant=t.quant,
        quant_double=bool(t.quant_double), quant_head=bool(t.quant_head), emb_cpu=bool(t.emb_cpu))


@dataclass(frozen=True)
class Gradients:
    """An optimizer step that is half done: its gradients are there, and nothing has changed yet."""

    live: LiveSettings
    micro_batches: list[Batch]
    n_trained: int      # tokens, of all processes
    tokens: int         # with the untrained ones and padding
    lr: float
    loss: float         # mean cross-entropy, nats per trained token
    fault: str          # why they must not be used, or ""
    began: float        # time.perf_counter()


class Trainer:
    """A run's model, adapter, data and optimizer.

    settings.train.load_model and settings.data.data_file must be given. Raises CheckpointError, DataError and
    SettingsError for what cannot be trained. train.before tells what a person should know of it.
    """

    def __init__(self, run: Run, settings: Settings, ranks: Ranks | None = None):
        check_together(settings)
        t = settings.train
        data_file = settings.data.data_file or settings.data.data_type == "dummy"
        for name, given in (("load_model", t.load_model), ("data_file", data_file)):
            if not given:
                raise SettingsError(f"{name} is not given", where=name, fix="set it, or run 01_prepare_data first; a "
                                    "model from scratch is made in Python, as in data_samples/make_base.py")
        self.run, self.settings, self.ranks = run, settings, ranks or Ranks()
        self.device = pick_device(t.accelerator, self.ranks.local)
        if self.device.type == "cpu":
            keep_freed_memory()
        else:
            torch.cuda.set_device(self.device)  # holds for this thread alone
            torch.cuda.reset_peak_memory_stats(self.device)  # the peak is this run's own
        if t.precision == "tf32" and self.device.type == "cpu":
            raise SettingsError("tf32 is a GPU's arithmetic", where="precision", fix="use fp32 or bf16 on a CPU")
        torch.backends.cuda.matmul.allow_tf32 = t.precision == "tf32"
        parted = self.ranks.size > 1 and t.strategy.startswith("deepspeed_stage_3")  # goes to the device in parts
        self.model = load_as_trained(t, device=torch.device("cpu") if parted else self.device)
        check_shape(t, self.model.shape)
        self.base = fingerprint(t.load_model)
        self.tokenizer = get_tokenizer(settings.data.tokenizer, self.model.shape.vocab_size)
        shape = self.model.shape
        self.op = pick_op(t.op, self.device, DTYPES[t.precision], shape.generation, shape.head_size)
        attach(self.model, settings.lora, t.random_seed)
        self.model.train()
        self.parameters = list(adapter_parameters(self.model))
        self.documents, self.heldout = open_split(settings.data, self.tokenizer, t.eval_file)
        self.batches = Batches(
            self.documents, ctx_len=settings.data.ctx_len, micro_bsz=t.micro_bsz,
            accumulate=t.live.accumulate_grad_batches, seed=t.random_seed, epoch_steps=t.epoch_steps,
            device="cpu" if t.chunk_ctx or t.emb_cpu else self.device, dataload=settings.data.dataload,
            rank=self.ranks.rank, world_size=self.ranks.size)
        self._agree()
        self.logs = Logs(run, settings, write=not self.ranks.rank)
        self.step, self.epoch_loss = 0, [0.0, 0]
        self._losses, self._skips = deque(maxlen=SPIKE_WINDOW), 0
        shared_out = self.ranks.size > 1 and t.strategy.startswith("deepspeed")
        self._update = None if shared_out else Update(self.parameters, t, self.ranks)
        self._stand()

    @property
    def optimizer(self) -> Update:
        """DeepSpeed's is made at its first use, when the adapter has its first values: it takes a copy of them."""
        if self._update is None:
            self._update = DeepSpeedUpdate(self.model, self.parameters, self.settings.train, self.ranks, self.device)
        return self._update

    def _agree(self) -> None:
        """Raise SettingsError where another process of this run has another base or other data."""
        for rank, (base, data) in enumerate(self.ranks.ask((self.base, self.batches.state()))):
            if (base, data) != (self.base, self.batches.state()):
                raise SettingsError(f"process {rank} of this run has another base or other data than {self.ranks.rank}",
                                    where="load_model, data_file", fix="give every machine the same files")

    def _stand(self) -> None:
        """Where the run stands after its last completed step; it keeps saying so while the next one is under way."""
        self._position = self.batches.state()
        self.epoch, self.part_of_epoch = self.batches.progress(self.step)  # completed, and share of the next
        self.total_steps = self.batches.total_steps(self.step, self.settings.train.epoch_count)

    @property
    def epoch_ended(self) -> bool:
        return self.step > 0 and self.part_of_epoch == 0

    @property
    def save_due(self) -> bool:
        """An epoch at whose end an adapter is saved has just ended; the last epoch always is one."""
        return self.epoch_ended and (self.epoch % self.settings.train.epoch_save == 0 or self.step == self.total_steps)

    def heldout_loss(self) -> float:
        """Mean cross-entropy over the held-out documents, nats per trained token; all processes call this."""
        # No more memory than a step takes: as many tokens at once, and no more states of texts, which are there three
        # times for a moment, than inputs of blocks, which a step keeps in any case.
        ctx_len, L = self.settings.data.ctx_len, self.model.shape.n_layer
        at_once = rows(self.settings) * min(ctx_len, self.settings.train.chunk_ctx or ctx_len)
        state = sum(part.nbytes for part in self.model.zero_state(1))
        texts = L * at_once * self.model.ln_out.weight.nbytes // (3 * state)
        how = {"op": self.op, "at_once": at_once, "texts": max(1, min(texts, TEXTS))}
        return self.ranks.tell(self.optimizer.compute(lambda: text_loss(self.model, self.heldout, **how)))

    def answers(self, prompts: Sequence[str], max_tokens: int, *, base: bool) -> list[str]:
        """What the adapter writes, or the base without it; all processes call this."""
        with strength(self.model, 0) if base else contextlib.nullcontext():
            return self.optimizer.compute(lambda: generate(self.model, self.tokenizer, prompts, max_tokens=max_tokens,
                                                           template=self.settings.data.template, op=self.op))

    def train_step(self, live: LiveSettings) -> dict:
        """One optimizer step under `live`; returns its row of metrics, as of update()."""
        return self.update(self.gradients(live))

    def gradients(self, live: LiveSettings) -> Gradients:
        """The first half of an optimizer step. Adapter, optimizer and place in the data are still what they were, and
        the loss has shown that they are sound: the moment for a checkpoint, unless it says otherwise (`fault`)."""
        began, t = time.perf_counter(), dataclasses.replace(self.settings.train, live=live)
        self.batches.accumulate(live.accumulate_grad_batches)
        self._stand()
        micro_batches = self.batches.next_step()
        mine = [(int(batch.mask.sum()), batch.inputs.numel()) for batch in micro_batches]
        n_trained, tokens = map(sum, zip(*(n for rank in self.ranks.ask(mine) for n in rank), strict=True))
        loss = self._learn(micro_batches, n_trained, live.lora_dropout)
        return Gradients(live, micro_batches, n_trained, tokens, learning_rate(self.step, self.total_steps, t), loss,
                         self._fault(loss), began)

    def update(self, gradients: Gradients) -> dict:
        """The second half: the adapter changes; an epoch's last step writes its line in train_log.txt. Returns the
        step's row of metrics.

        A loss or gradient that is not a number, and a spike, leave the adapter as it is: TrainingError, or with
        on_spike=skip a row that is a "skip" event and has no loss. After any other error the adapter may be half
        changed: only a checkpoint is good then.
        """
        g, fault, norm = gradients, gradients.fault, math.nan
        if fault:
            self.optimizer.zero_grad()
        else:
            norm = self._move(g)
            fault = "" if math.isfinite(norm) else f"gradient norm {norm}: not a number"
        if fault:
            self._skips += 1
            if self.settings.train.on_spike == "stop" or self._skips > MOST_SKIPS:
                raise TrainingError(fault, where=f"step {self.step + 1}", fix=_NOT_A_NUMBER)
        else:
            self._losses.append(g.loss)
            self._skips = 0
            self.epoch_loss = [self.epoch_loss[0] + g.loss * g.n_trained, self.epoch_loss[1] + g.n_trained]
        self.step += 1
        self._stand()
        if self.epoch_ended:
            self.logs.epoch(self.epoch, self.epoch_loss[0] / max(self.epoch_loss[1], 1), g.lr)
            self.epoch_loss = [0.0, 0]
        if fault:
            return {"step": self.step, "event": "skip", "why": fault, "lr": g.lr}
        return {"step": self.step, "epoch": round(self.epoch + self.part_of_epoch, 4), "loss": g.loss, "lr": g.lr,
                "grad_norm": norm, "tokens": g.n_trained,
                "tokens_per_s": round(g.tokens / (time.perf_counter() - g.began), 1),
                "peak_memory_mb": round(self._peak_memory() / 1e6, 1)}

    def _learn(self, micro_batches: Sequence[Batch], n_trained: int, dropout: float) -> float:
        """Make one step's gradients; returns its mean loss."""
        ce = torch.zeros((), device=self.device)
        for micro, batch in enumerate(micro_batches):
            number = micro * self.ranks.size + self.ranks.rank
            ce += self.optimizer.compute(partial(self._backward, batch, n_trained, number, dropout))
        self.ranks.add([ce])
        return float(ce) / max(n_trained, 1)

    def _move(self, g: Gradients) -> float:
        """Change the adapter; returns the gradient's norm, and where that is not a number nothing has changed.

        A step that overflowed under a loss scale is computed again under the smaller one, so that none is lost.
        """
        while True:
            scaled = self.optimizer.scale > 1
            norm = self.optimizer.step(g.lr, g.live.grad_clip)
            if math.isfinite(norm) or not scaled:
                break
            self._learn(g.micro_batches, g.n_trained, g.live.lora_dropout)
        for part in trained_parts(self.model).values() if math.isfinite(norm) else ():
            part.use()                    # the model computes with a copy in its own dtype
        return norm

    def _backward(self, batch: Batch, n_trained: int, micro: int, dropout: float) -> Tensor:
        """Add one micro-batch's gradients; returns its Σ cross-entropy."""
        t = self.settings.train

        def draw(chunk: int) -> None:
            set_dropout_step(self.model, t.random_seed, self.step, f"{micro}.{chunk}", dropout)

        how, scale = {"op": self.op, "grad_cp": t.grad_cp}, self.optimizer.scale
        if t.chunk_ctx:
            return backward_by_chunks(self.model, batch, n_trained, t.chunk_ctx, truncated=bool(t.truncated_bptt),
                                      scale=scale, before_chunk=draw, **how)
        draw(0)
        hidden, _ = self.model.hidden(batch.inputs, starts=batch.starts, keep_state=False, **how)
        targets = batch.targets.to(self.device, non_blocking=True)
        loss, ce = head_loss(hidden, self.model.head, targets, batch.mask, n_trained)
        (loss * scale).backward()
        return ce

    def _fault(self, loss: float) -> str:
        """Why a step with this loss must not be used, or ""."""
        if not math.isfinite(loss):
            return f"loss {loss}: not a number"
        usual, factor = statistics.median(self._losses or [math.inf]), self.settings.train.spike_factor
        if factor and len(self._losses) >= SPIKE_WINDOW // 5 and loss > factor * usual:
            return f"loss {loss:.4g} is a spike: {loss / usual:.3g} times the median of the steps before ({usual:.4g})"
        return ""

    def _peak_memory(self) -> int:
        """Bytes: the allocator's peak on a GPU, the whole process's on a CPU (ru_maxrss is in KiB on Linux)."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def save(self, name: int | str) -> list[Path]:
        """Save adapter-{name}.safetensors and, at an epoch's end with merge=1, rwkv-{name}.pth. Returns the files.

        All processes call this; the first one writes.
        """
        s, files = self.settings, [self.run.adapter_file(name)]
        files += [self.run.merged_file(name)] if s.train.merge and isinstance(name, int) else []
        with self.optimizer.whole():
            if not all(bool(p.isfinite().all()) for p in self.parameters):
                raise TrainingError("the adapter holds values that are not numbers, and was not saved",
                                    where=f"step {self.step}", fix=_NOT_A_NUMBER)
            if not self.ranks.rank:
                save_adapter(files[0], self.model, AdapterMeta(
                    s.lora.r, s.lora.lora_alpha, s.lora.target_modules, self.model.shape, self.base,
                    Path(s.train.load_model).name, s.data.template, self.tokenizer.name, self.epoch, self.step,
                    s.train.quant))
        if not self.ranks.rank and len(files) > 1:
            merge(s.train.load_model, *files, prove=False)
        return files

    def checkpoint(self, live: LiveSettings) -> None:
        """Write all that resume() needs. All processes call this; the first one writes."""
        update = self.optimizer
        optimizer = update.state_dict()
        with update.whole():
            saved = Checkpoint(
                step=self.step, adapter=adapter_tensors(self.model), optimizer=optimizer, data=self._position,
                epoch_loss=list(self.epoch_loss), losses=list(self._losses), live=live,
                loss_scale=[update.scale, update.good_steps], settings=self.settings,
                base=self.base, log_sizes=self.logs.sizes(), finished=self.step >= self.total_steps)
            if not self.ranks.rank:
                saved.save(self.run)

    def release(self) -> None:
        """Let go of all large tensors and of the logs; where the run stands and its documents can still be read."""
        if self.model is not None:
            self.logs.close()
            self.model = self.parameters = self._update = None

    def resume(self, saved: Checkpoint) -> None:
        """Go on from a checkpoint of this base: adapter, optimizer, data position; logs are cut back to its step."""
        set_adapter_tensors(self.model, saved.adapter)
        self.optimizer.load_state_dict(saved.optimizer)
        self.batches.load(saved.data)
        self.batches.accumulate(saved.live.accumulate_grad_batches)
        self.step, self.epoch_loss = saved.step, list(saved.epoch_loss)
        self._losses.extend(saved.losses)
        self.optimizer.scale, self.optimizer.good_steps = saved.loss_scale
        self._stand()
        self.logs.cut(saved.log_sizes)
