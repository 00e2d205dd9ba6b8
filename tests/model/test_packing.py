"""Texts one behind the other in a row: outputs and gradients are those of each text alone."""

import json

import pytest
import torch

from rwkv_nb.config import Settings, replace
from rwkv_nb.data.batches import Batches
from rwkv_nb.data.sources import open_documents
from rwkv_nb.loss import head_loss
from rwkv_nb.runs import Run
from rwkv_nb.tokenizer import get_tokenizer
from rwkv_nb.train.loop import Trainer
from rwkv_nb.wkv import OPS, wkv5, wkv6, wkv7


def row(sizes, vocab=257):
    texts = [torch.randint(vocab, (1, size)) for size in sizes]
    starts = torch.zeros(1, sum(sizes), dtype=torch.bool)
    starts[0, torch.tensor([0, *sizes[:-1]]).cumsum(0)] = True
    return texts, torch.cat(texts, 1), starts


def near(a, b, tolerance=1e-5):
    """Equal to a share of b's length: in fp32 a single number may be further off where a norm divides by little."""
    assert (a - b).norm() <= tolerance * b.norm(), float((a - b).norm() / b.norm())


@pytest.mark.parametrize("sizes", [[1], [1, 1, 2], [16, 1, 40, 3, 17], [5, 5, 64, 2]])
def test_no_text_sees_another(model, sizes, tolerance=1e-11):
    texts, packed, starts = row(sizes)
    model, weight = model.double(), torch.randn(sum(sizes), model.shape.n_embd, dtype=torch.float64)

    def gradients(hidden):
        model.zero_grad()
        (hidden * weight).sum().backward()
        return hidden.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    alone, wanted = gradients(torch.cat([model.hidden(text)[0] for text in texts], 1))
    for grad_cp in ("none", "block", "selective"):
        together, got = gradients(model.hidden(packed, starts=starts, grad_cp=grad_cp)[0])
        near(together, alone, tolerance)
        for name, gradient in wanted.items():
            assert name in got or not gradient.any(), name
            near(got.get(name, gradient), gradient, 10 * tolerance)   # sums of many terms in another order


@torch.inference_mode()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_two_rows_are_two_rows(lively, dtype, tolerance):
    model, (texts, packed, starts), (other, one, begin) = lively().to(dtype), row([13, 7, 40]), row([60])
    both, _ = model.hidden(torch.cat([packed, one]), starts=torch.cat([starts, begin]))
    near(both[:1], torch.cat([model.hidden(text)[0] for text in texts], 1), tolerance)
    near(both[1:], model.hidden(other[0])[0], tolerance)


@pytest.mark.parametrize("wkv", [wkv7, wkv6, wkv5], ids=lambda wkv: wkv.__name__)
@pytest.mark.parametrize("op", [op for op in OPS if op in ("torch", "chunked", "cpu")])
def test_every_op_takes_packed_rows(wkv, op):
    B, T, H, N = 2, 37, 2, 64
    starts = torch.rand(B, T) < 0.2
    starts[:, 0] = True
    inputs = [torch.randn(B, T, H, N) * 0.3 for _ in range(6 if wkv is wkv7 else 4)]
    if wkv is not wkv7:
        inputs += [torch.randn(H, N)]
        inputs[1] = inputs[1] if wkv is wkv6 else torch.randn(H, N)
    y, same = wkv(*inputs, starts, op=op)
    assert same is starts
    for b in range(B):
        borders = [*starts[b].nonzero()[:, 0].tolist(), T]
        for i, j in zip(borders, borders[1:], strict=False):
            alone, _ = wkv(*(x[b:b + 1, i:j] if x.dim() == 4 else x for x in inputs), op=op)
            near(y[b:b + 1, i:j], alone)


def test_a_packed_step_has_the_gradient_of_a_padded_one(base, tmp_path):
    texts = [f"User: {'word ' * n}\n\nAssistant: {'answer ' * (n % 5 + 1)}" for n in (1, 9, 3, 14, 2, 5, 7, 30)]
    data = tmp_path / "a.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    gradients = {}
    for dataload, micro_bsz in (("split", 20), ("pack", 20), ("pack", 2)):
        settings = replace(Settings(), load_model=str(base), data_file=str(data), proj_dir=str(tmp_path), ctx_len=64,
                           micro_bsz=micro_bsz, dataload=dataload, lora_dropout=0.0, epoch_count=1,
                           accumulate_grad_batches=1 if micro_bsz == 20 else 10)
        trainer = Trainer(Run(tmp_path / f"{dataload}{micro_bsz}"), settings)
        batches = trainer.batches.next_step()
        n = sum(int(batch.mask.sum()) for batch in batches)
        for batch in batches:
            hidden, _ = trainer.model.hidden(batch.inputs, starts=batch.starts)
            head_loss(hidden, trainer.model.head, batch.targets, batch.mask, n)[0].backward()
        gradients[dataload, micro_bsz] = torch.cat([p.grad.flatten() for p in trainer.parameters])
    for got in (gradients["pack", 20], gradients["pack", 2]):
        near(got, gradients["split", 20], 1e-4)


def test_packing_keeps_every_trained_token_of_a_file(chats):
    tokenizer = get_tokenizer("byte")
    documents = open_documents(replace(Settings(), data_file=str(chats)).data, tokenizer)
    batches = Batches(documents, ctx_len=100, micro_bsz=3, accumulate=2, seed=0, dataload="pack")
    trained = sum(int(b.mask.sum()) for _ in range(batches.steps_per_epoch) for b in batches.next_step())
    assert trained == sum(int(d.mask[1:].sum()) for d in documents)
