"""One whole LoRA step at the 0.1B shape on the CPU, against the same step in the `rwkvtune` package and against its
own matrix products alone; and of RWKV-6 and -5 with as many layers and channels.

    python tests/benchmarks/bench_step.py [--peer-python PYTHON] [--threads 4] [--rounds 7] [--out results/step.json]

PYTHON: the interpreter of an environment in which `rwkvtune` is installed; without it that half is left out, and the
result says so. With it 16 GB of free memory are needed. Every variant runs in a process of its own, so that its peak
memory (ru_maxrss, Python and torch included) is its own; all have the same weights and tokens, and take one step in
turn, round after round. A ratio is the median of the rounds' ratios.
"""

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

T, RANK, ALPHA, DROPOUT, LR = 512, 32, 64, 0.01, 2e-4   # the library's defaults; micro-batches of one document
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RATIOS = {  # text: (one variant, another, what of both, bar)
    "seconds, rwkvtune ÷ rwkv_nb": ("rwkvtune", "rwkv_nb", "seconds", "≥ 3"),
    "seconds, rwkvtune ÷ rwkv_nb bf16": ("rwkvtune", "rwkv_nb bf16", "seconds", "≥ 8"),
    "peak memory, rwkvtune ÷ rwkv_nb": ("rwkvtune", "rwkv_nb", "peak_mb", "≥ 3"),
    "peak memory, rwkvtune ÷ rwkv_nb bf16": ("rwkvtune", "rwkv_nb bf16", "peak_mb", "≥ 3"),
    "seconds, rwkv_nb ÷ products": ("rwkv_nb", "products", "seconds", "≤ 1.6"),
    "seconds, rwkv_nb bf16 ÷ products bf16": ("rwkv_nb bf16", "products bf16", "seconds", ""),
    "checkpointing: seconds, rwkvtune ÷ rwkv_nb": ("rwkvtune cp", "rwkv_nb cp", "seconds", ""),
    "checkpointing: peak memory, rwkvtune ÷ rwkv_nb": ("rwkvtune cp", "rwkv_nb cp", "peak_mb", ""),
    "checkpointing: peak memory, rwkvtune ÷ rwkv_nb bf16": ("rwkvtune cp", "rwkv_nb bf16 cp", "peak_mb", ""),
}


def ours(folder: Path, precision: str, grad_cp: int):
    """rwkv_nb: the engine that the notebooks and the command line run."""
    from rwkv_nb.config import DataSettings, LiveSettings, LoraSettings, Settings, TrainSettings
    from rwkv_nb.runs import Run
    from rwkv_nb.train.loop import Trainer

    live = LiveSettings(lr_init=LR, lr_final=LR, lora_dropout=DROPOUT)
    trainer = Trainer(Run(folder / "run"), Settings(
        DataSettings(data_file=str(folder / "data"), template="plain", ctx_len=T),
        LoraSettings(r=RANK, lora_alpha=ALPHA),
        TrainSettings(load_model=str(folder / "base.pth"), precision=precision, grad_cp=grad_cp, epoch_steps=1000,
                      live=live, warmup_steps=0, accelerator="cpu", merge=0)))
    return lambda: trainer.train_step(live)["loss"]


def peer(folder: Path, precision: str, grad_cp: int):
    """rwkvtune's own model, LoRA, loss and optimizer, without Lightning's loop around them. It trains in fp32 alone on
    a CPU. modules_to_save is empty so that both train the same tensors."""
    sys.modules["deepspeed"] = None  # where it is installed, rwkvtune asks a Trainer about it, on a CPU too
    from rwkvtune.models.rwkv7 import RWKV7Config, RWKV7Model
    from rwkvtune.peft import LoraConfig, get_peft_model
    from rwkvtune.training.lightning_module import RWKV7LightningModule

    weights = torch.load(folder / "base.pth", mmap=True, weights_only=True)
    widths = {c: weights[f"blocks.1.att.{c}1"].shape[1] for c in "wgv"}
    config = RWKV7Config(n_layer=12, n_embd=768, ctx_len=T, micro_bsz=1, accelerator="cpu", precision=precision,
                         grad_cp=grad_cp, weight_decay=0.0, lr_init=LR, adam_eps=1e-8, dim_att_lora=widths["w"],
                         dim_gate_lora=widths["g"], dim_mv_lora=widths["v"])
    model = RWKV7Model(config)
    for name, parameter in model.named_parameters():  # its load_state_dict would copy everything once more
        parameter.data.copy_(weights[name])
    get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, modules_to_save=[]))
    module = RWKV7LightningModule(config, model).train()
    optimizer = module.configure_optimizers()
    tokens = torch.frombuffer(bytearray((folder / "data.bin").read_bytes()), dtype=torch.uint16).long()[None]

    def step() -> float:
        loss = module.training_step({"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}, 0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()
    return step


def products(folder: Path, precision: str, grad_cp: int):
    """Every matrix product of the step and nothing else, into memory that is there already: the frozen products and
    their input gradients (where an input needs one: not at the bottom of the model), the adapter's small ones with
    their gradients, the head. WKV-7 is no matrix product."""
    from rwkv_nb.model import load_model

    dtype = DTYPES[precision]
    weights = load_model(folder / "base.pth", dtype=dtype).state_dict()
    pairs = [p for key, w in weights.items() if (p := _right_hand_sides(key, w))]
    inputs = {n: torch.randn(T, n, dtype=dtype) for n in {n for right, *_ in pairs for n in right.shape}}
    buffers = {}

    def mm(a, b):
        shape = a.shape[0], b.shape[1]
        if shape not in buffers:
            buffers[shape] = torch.empty(shape, dtype=dtype)
        return torch.mm(a, b, out=buffers[shape])

    def step() -> None:
        for right, _, lora in pairs:
            x = inputs[right.shape[0]]
            mm(x, right)
            if lora:
                mm(mm(x, lora[0].t()), lora[1].t())
        for right, needs_dx, lora in reversed(pairs):
            x, dy = inputs[right.shape[0]], inputs[right.shape[1]]
            if needs_dx:
                mm(dy, right.t())
            if lora:
                A, B = lora
                middle = mm(dy, B)
                mm(dy.t(), middle), mm(middle.t(), x)
                if needs_dx:
                    mm(middle, A)
    return step


def _right_hand_sides(key: str, w: torch.Tensor):
    """(matrix [in,out], does its input need a gradient, (A [R,in], B [out,R]) or None) of a product x @ matrix."""
    if w.dim() != 2 or key.endswith("r_k") or key == "emb.weight":
        return None
    linear = key.endswith(".weight")
    right = w.t() if linear else w
    bottom = key.startswith("blocks.0.att") and "output" not in key  # what stands before block 0 is frozen
    lora = None
    if linear and key != "head.weight":
        lora = torch.randn(RANK, right.shape[0], dtype=w.dtype), torch.randn(right.shape[1], RANK, dtype=w.dtype)
    return right, not bottom, lora


def work(kind: str, folder: str, precision: str, grad_cp: int, threads: int) -> None:
    """A variant's process: one step for each line on stdin, one line of figures for each on stdout."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what a package prints must not land between the figures
    torch.set_num_threads(threads)
    step = {"ours": ours, "peer": peer, "products": products}[kind](Path(folder), precision, grad_cp)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step()
        row = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu, "loss": loss,
               "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6}
        print(json.dumps(row), file=answers, flush=True)


class Variant:
    """A process that takes a step when asked."""

    def __init__(self, python: str, threads: int, kind: str, folder: Path, precision="fp32", grad_cp=0):
        arguments = ["--work", kind, str(folder), precision, str(grad_cp), "--threads", str(threads)]
        self.process = subprocess.Popen([python, __file__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True, env=os.environ | {"RWKV_DEVICE": "cpu"})
        self.rows: list[dict] = []

    def step(self) -> None:
        try:
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
            self.rows.append(json.loads(self.process.stdout.readline()))
        except (BrokenPipeError, json.JSONDecodeError):
            raise SystemExit(self.process.communicate()[1][-2000:]) from None

    def close(self) -> list[dict]:
        self.process.communicate()
        return self.rows


def race(variants: dict[str, tuple], rounds: int, warm_up: int = 2) -> dict[str, list[dict]]:
    """All variants at once, a step each in turn. Returns each one's rows; the first warm_up are not for timing."""
    running = {name: Variant(*how) for name, how in variants.items()}
    for i in range(warm_up + rounds):
        for variant in running.values():
            variant.step()
        print(f"round {i + 1 - warm_up}: " + " · ".join(f"{name} {variant.rows[-1]['seconds']:.2f} s"
                                                         for name, variant in running.items()), flush=True)
    return {name: variant.close() for name, variant in running.items()}


def shapes() -> dict:
    """{version's number: its shape with 12 layers of 768 channels}."""
    from rwkv_nb.model import PUBLISHED, PUBLISHED_OLDER

    size = {"n_layer": 12, "n_embd": 768, "ffn_dim": 768 * 7 // 2}
    return {7: PUBLISHED["0.1B"], 6: dataclasses.replace(PUBLISHED_OLDER["v6 1.6B"], **size),
            5: dataclasses.replace(PUBLISHED_OLDER["v5 0.4B"], **size)}


def make_inputs(folder: Path, shape) -> Path:
    """base.pth (bf16, as released models are) and one document of T + 1 tokens. Returns the folder, made here."""
    import numpy as np

    from rwkv_nb.data.binidx import pair, write_index
    from rwkv_nb.model import RWKV, init_weights, save_weights

    folder.mkdir()
    model = init_weights(RWKV(shape))
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # zeros would make gradients vanish, and some products with them
                parameter.normal_(std=0.02)
    save_weights(folder / "base.pth", {key: value.bfloat16() for key, value in model.state_dict().items()})
    bin_file, idx_file = pair(folder / "data")
    torch.randint(1, 65530, (T + 1,)).numpy().astype("<u2").tofile(bin_file)
    write_index(idx_file, np.array([T + 1]))
    return folder


def summary(rows: dict[str, list[dict]], warm_up: int = 2) -> dict:
    """Medians of each variant, and the ratios of which both halves were run."""
    variants, ratios = {}, {}
    for name, steps in rows.items():
        timed = steps[warm_up:]
        seconds, cpu = (statistics.median(row[what] for row in timed) for what in ("seconds", "cpu_seconds"))
        variants[name] = {"seconds": round(seconds, 3), "cpu_seconds": round(cpu, 3),
                          "tokens_per_s": round(T / seconds), "peak_mb": round(steps[-1]["peak_mb"]),
                          "first_loss": steps[0]["loss"]}
    for text, (one, other, what, bar) in RATIOS.items():
        if one in rows and other in rows:
            pairs = zip(rows[one][warm_up:], rows[other][warm_up:], strict=True)
            ratios[text] = {"ratio": round(statistics.median(a[what] / b[what] for a, b in pairs), 2), "bar": bar}
    return {"variants": variants, "ratios": ratios}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--peer-python", help="interpreter of an environment with rwkvtune in it")
    options.add_argument("--threads", type=int, default=4)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "step.json")
    options.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.work:
        kind, folder, precision, grad_cp = chosen.work
        return work(kind, folder, precision, int(grad_cp), chosen.threads)

    from machine import describe

    machine = describe() | {"threads": chosen.threads}
    with tempfile.TemporaryDirectory() as name:
        us, peer = (sys.executable, chosen.threads, "ours"), (chosen.peer_python, chosen.threads, "peer")
        folders = {version: make_inputs(Path(name) / str(version), shape) for version, shape in shapes().items()}
        folder, bare = folders[7], (*us[:2], "products", folders[7])
        plain = {"rwkv_nb": (*us, folder), "products": bare, "rwkv_nb bf16": (*us, folder, "bf16"),
                 "products bf16": (*bare, "bf16")}
        lean = {"rwkv_nb cp": (*us, folder, "fp32", 1), "rwkv_nb bf16 cp": (*us, folder, "bf16", 1)}
        older = {f"rwkv_nb RWKV-{version}{name}": (*us, folders[version], *how)
                 for version in (6, 5) for name, how in {"": (), " bf16": ("bf16",)}.items()}
        if chosen.peer_python:
            plain["rwkvtune"], lean["rwkvtune cp"] = (*peer, folder), (*peer, folder, "fp32", 1)
        result = summary(race(plain, chosen.rounds) | race(lean, chosen.rounds) | race(older, chosen.rounds))
    if not chosen.peer_python:
        result["left out"] = "rwkvtune: no --peer-python, an interpreter that can import it, was given"
    shape = (f"L12 C768 V65536, T={T}, micro-batch 1, r={RANK}; RWKV-7 and fp32 unless said; cp: with gradient "
             "checkpointing")
    result = {"what": " ".join(__doc__.split("\n\n")[0].split()), "shape": shape, "machine": machine,
              "rounds": chosen.rounds} | result
    chosen.out.parent.mkdir(exist_ok=True)
    chosen.out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(result, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
