"""Trains the tiny base from scratch on the text of make_texts.py and writes tiny_base.pth.

    python data_samples/make_base.py [--steps 2500] [--threads 2]

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
from make_texts import TEMPLATES, Facts, base_text, fill

from rwkv_nb.model import RWKV7, Shape, init_weights, save_weights

SHAPE = Shape(n_layer=4, n_embd=128, vocab_size=257, rank_w=32, rank_a=32, rank_v=32, rank_g=64, ffn_dim=512)
BATCH = 64             # documents a step
LR, LR_FINAL, WARMUP = 2e-3, 2e-5, 50
SORTED = 32            # this many batches are drawn at once and sorted by length, so that little is padding
COPYING = [t for t in TEMPLATES["chats"] if any(s in t for s in ("Say ", "number of", "colour", "请说", "谁是"))]


def rows(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Documents → inputs, targets int64 [B,T]; a 0 closes each document, -1 marks padding (not trained)."""
    tokens = [torch.tensor([byte + 1 for byte in text.encode()] + [0]) for text in texts]
    targets = torch.nn.utils.rnn.pad_sequence([t[1:] for t in tokens], batch_first=True, padding_value=-1)
    inputs = torch.nn.utils.rnn.pad_sequence([t[:-1] for t in tokens], batch_first=True)
    return inputs, targets


def batches(seed: int):
    """Endless (inputs, targets)."""
    texts, rng = base_text(seed), random.Random(seed)
    while True:
        drawn = sorted(itertools.islice(texts, BATCH * SORTED), key=len)
        groups = [drawn[i:i + BATCH] for i in range(0, len(drawn), BATCH)]
        rng.shuffle(groups)
        yield from map(rows, groups)


def optimizer_for(model: RWKV7) -> torch.optim.AdamW:
    """Weight decay for matrices alone."""
    matrices = [p for n, p in model.named_parameters() if n.endswith(".weight") and p.dim() == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
                             lr=LR, betas=(0.9, 0.99), eps=1e-12, fused=True)


@torch.inference_mode()
def report(model: RWKV7, n: int = 256) -> str:
    """Loss on held-out text, and the share of chat answers whose every byte is the model's first choice."""
    inputs, targets = rows(list(itertools.islice(base_text(99, held_out=True), n)))
    loss = F.cross_entropy(model(inputs)[0].flatten(0, 1), targets.flatten(), ignore_index=-1)
    rng = random.Random(99)
    chats = [fill(rng.choice(COPYING), Facts(rng)) for _ in range(n)]
    inputs, targets = rows(chats)
    right = (model(inputs)[0].argmax(-1) == targets) | (targets == -1)
    # position t predicts byte t + 1, and the answer's first byte stands right after "Assistant: "
    exact = [right[i, len(c[:c.index("Assistant: ") + 11].encode()) - 1:].all().item() for i, c in enumerate(chats)]
    return f"held-out loss {loss:.4f} · copied whole {sum(exact) / n:.3f}"


def train(steps: int, seed: int = 1, log=print) -> RWKV7:
    model = init_weights(RWKV7(SHAPE), seed)
    optimizer, began, running = optimizer_for(model), time.time(), 0.0
    for step, (inputs, targets) in enumerate(itertools.islice(batches(seed), steps)):
        wave = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = min(1, (step + 1) / WARMUP) * (LR_FINAL + (LR - LR_FINAL) * wave)
        loss = F.cross_entropy(model(inputs)[0].flatten(0, 1), targets.flatten(), ignore_index=-1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running += loss.item()
        if (step + 1) % 50 == 0:
            line = f"step {step + 1:5d} loss {running / 50:.4f} {(step + 1) / (time.time() - began):.2f} steps/s"
            log(line + (" · " + report(model) if (step + 1) % 200 == 0 else ""))
            running = 0.0
    return model


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--steps", type=int, default=2500)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--out", type=Path, default=Path(__file__).with_name("tiny_base.pth"))
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    model = train(chosen.steps, log=lambda line: print(line, flush=True))
    print(f"{model.shape.n_params():,} parameters · {report(model, 1024)}")
    save_weights(chosen.out, {key: value.bfloat16() for key, value in model.state_dict().items()})


if __name__ == "__main__":
    main()
