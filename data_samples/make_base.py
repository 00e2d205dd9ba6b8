"""Trains the tiny base from scratch on the text of make_texts.py and writes tiny_base.pth.

    python data_samples/make_base.py --steps 5000
    python data_samples/make_base.py --steps 1200 --lr 1e-3 --seed 11 --start data_samples/tiny_base.pth

All parameters are trained, on text drawn afresh for every step: nothing is seen twice but the prose, so the model
learns to read and to copy rather than to remember.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from make_texts import TEMPLATES, Facts, base_text, fill, general, repeats

from rwkv_nb.model import RWKV, Shape, init_weights, load_weights, save_weights

SHAPE = Shape(n_layer=4, n_embd=128, vocab_size=257, rank_w=32, rank_a=32, rank_v=32, rank_g=64, ffn_dim=512)
BATCH = 32             # documents a step
COPY_STEPS = 400       # steps on repeats alone; after them
TEXT = 0.7             # of the documents are text, the rest repeats
LR, LR_FINAL, WARMUP = 2e-3, 2e-5, 50
SORTED = 32            # this many batches are drawn at once and sorted by length, so that little is padding
COPYING = [t for t in TEMPLATES["chats"] if any(s in t for s in ("Say ", "number of", "colour", "请说", "谁是"))]


def rows(documents: list[tuple[str, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(text, start) → inputs, targets int64 [B,T]. A 0 closes each document; targets before character `start` and
    padding are -1, not trained."""
    tokens = [torch.tensor([byte + 1 for byte in text.encode()] + [0]) for text, _ in documents]
    targets = torch.nn.utils.rnn.pad_sequence([t[1:] for t in tokens], batch_first=True, padding_value=-1)
    for target, (text, start) in zip(targets, documents, strict=True):
        target[:max(0, len(text[:start].encode()) - 1)] = -1
    inputs = torch.nn.utils.rnn.pad_sequence([t[:-1] for t in tokens], batch_first=True)
    return inputs, targets


def batches(seed: int, share_of_text: float):
    """Endless (inputs, targets): base text, and for the rest repeats."""
    texts, copies, rng = base_text(seed), repeats(seed), random.Random(seed)
    while True:
        drawn = [(next(texts), 0) if rng.random() < share_of_text else next(copies) for _ in range(BATCH * SORTED)]
        drawn.sort(key=lambda document: len(document[0].encode()))
        groups = [drawn[i:i + BATCH] for i in range(0, len(drawn), BATCH)]
        rng.shuffle(groups)
        yield from map(rows, groups)


def optimizer_for(model: RWKV) -> torch.optim.AdamW:
    """Weight decay for matrices alone."""
    matrices = [p for n, p in model.named_parameters() if n.endswith(".weight") and p.dim() == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
                             lr=LR, betas=(0.9, 0.99), eps=1e-12, fused=True)


@torch.inference_mode()
def report(model: RWKV, n: int = 200) -> str:
    """Loss on held-out text, and the share of chat answers whose every byte is the model's first choice."""
    inputs, targets = rows([(text, 0) for text in general(n)])
    loss = F.cross_entropy(model(inputs)[0].flatten(0, 1), targets.flatten(), ignore_index=-1)
    rng = random.Random(99)
    chats = [fill(rng.choice(COPYING), Facts(rng)) for _ in range(n)]
    inputs, targets = rows([(text, text.index("Assistant: ") + 11) for text in chats])
    right = (model(inputs)[0].argmax(-1) == targets) | (targets == -1)
    return f"held-out loss {loss:.4f} · copied whole {right.all(1).float().mean():.3f}"


def train(steps: int, lr: float, out: Path, seed: int, start: Path | None) -> RWKV:
    """Cosine-decayed AdamW, from scratch or from the weights in `start`; saves at every report."""
    model, copy_steps = init_weights(RWKV(SHAPE), seed), COPY_STEPS
    if start:
        model.load_state_dict({key: value.float() for key, value in load_weights(start).items()})
        copy_steps = 0
    optimizer, began, running = optimizer_for(model), time.time(), 0.0
    data = itertools.chain(itertools.islice(batches(seed, 0.0), copy_steps), batches(seed + 1, TEXT))
    for step, (inputs, targets) in enumerate(itertools.islice(data, steps)):
        wave = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = min(1, (step + 1) / WARMUP) * (LR_FINAL + (lr - LR_FINAL) * wave)
        loss = F.cross_entropy(model(inputs)[0].flatten(0, 1), targets.flatten(), ignore_index=-1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running += loss.item()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1:5d} loss {running / 50:.4f} {time.time() - began:.0f} s", flush=True)
            running = 0.0
        if (step + 1) % 250 == 0 or step + 1 == steps:
            print(report(model), flush=True)
            save_weights(out, {key: value.bfloat16() for key, value in model.state_dict().items()})
    return model


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--steps", type=int, default=5000)
    options.add_argument("--lr", type=float, default=LR)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--start", type=Path, help="go on from these weights instead of from scratch")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--out", type=Path, default=Path(__file__).with_name("tiny_base.pth"))
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    model = train(chosen.steps, chosen.lr, chosen.out, chosen.seed, chosen.start)
    print(f"{model.shape.n_params():,} parameters · {report(model, 1000)}")


if __name__ == "__main__":
    main()
