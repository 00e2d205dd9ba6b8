"""A training step on a device that is not the CPU, without one: torch's "meta" stands in for a GPU.

Fake tensors refuse an operation over two devices; meta tensors refuse what would make a CPU wait for a GPU's numbers.
"""

import dataclasses

import pytest
import torch
from token_files import source_of
from torch._subclasses import FakeTensorMode

from rwkv_nb.config import LoraSettings
from rwkv_nb.data.batches import Batches
from rwkv_nb.data.sources import Document
from rwkv_nb.lora.layers import adapter_parameters, attach
from rwkv_nb.loss import head_loss
from rwkv_nb.model import PUBLISHED, PUBLISHED_OLDER, RWKV
from rwkv_nb.model.checkpoint import assemble

SHAPES = {"v7": PUBLISHED["0.1B"], "v6": PUBLISHED_OLDER["v6 1.6B"], "v5": PUBLISHED_OLDER["v5 0.4B"]}


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # torch knows none for meta, and raises


def small(version):
    model = RWKV(dataclasses.replace(SHAPES[version], n_layer=2), device="meta", dtype=torch.bfloat16)
    attach(model, LoraSettings(r=4), seed=0)
    return model.train()


@pytest.mark.parametrize("op", ["torch", "chunked"])
@pytest.mark.parametrize("version", SHAPES)
def test_everything_a_step_makes_is_on_the_models_device(version, op):
    with FakeTensorMode():
        model = small(version)
        T = 17 if op == "chunked" else 3    # more than a chunk; a few steps
        tokens = torch.zeros(2, T, dtype=torch.long, device="meta")
        for state, grad_cp in ((None, "none"), (model.zero_state(2), "block"), (None, "selective")):
            hidden, after = model.hidden(tokens, state, op=op, grad_cp=grad_cp)
            assert {x.device.type for x in (hidden, *after)} == {"meta"}
            sum(x.float().sum() for x in (hidden, *after)).backward()
        assert {p.grad.device.type for p in adapter_parameters(model)} == {"meta"}


@pytest.mark.parametrize("dataload", ["split", "pack"])
def test_a_step_waits_for_no_number_of_the_device(dataload):
    documents = [Document(torch.arange(1, n).numpy().astype("uint16"), torch.ones(n - 1).bool().numpy())
                 for n in (9, 20, 14)]
    batches = Batches(source_of(documents), ctx_len=16, micro_bsz=2, accumulate=2, seed=0, device="meta",
                      dataload=dataload)
    model, step = small("v7"), batches.next_step()
    n_trained = sum(int(batch.mask.sum()) for batch in step)
    for batch in step:
        hidden, _ = model.hidden(batch.inputs, op="chunked", keep_state=False, starts=batch.starts)
        loss, ce = head_loss(hidden, model.head, batch.targets, batch.mask, n_trained)
        loss.backward()
    grads = [p.grad for p in adapter_parameters(model)]
    torch.nn.utils.clip_grad_norm_(list(adapter_parameters(model)), 1.0)
    assert ce.device.type == "meta" and all(grad.device.type == "meta" for grad in grads)


@pytest.mark.parametrize("emb_cpu", [True, False])
def test_tokens_may_lie_on_the_cpu_and_the_embedding_too(emb_cpu):
    shape = dataclasses.replace(SHAPES["v7"], n_layer=2, vocab_size=99)
    weights = {key: torch.zeros(size) for key, size in shape.key_shapes().items()}
    model = assemble(shape, weights.items(), device="meta", emb_cpu=emb_cpu)
    assert model.emb.weight.device.type == ("cpu" if emb_cpu else "meta") and model.head.weight.device.type == "meta"
    attach(model, LoraSettings(r=4), seed=0)
    hidden, after = model.hidden(torch.zeros(2, 9, dtype=torch.long), op="chunked")
    assert {x.device.type for x in (hidden, *after)} == {"meta"}
    hidden.sum().backward()
    assert {p.grad.device.type for p in adapter_parameters(model)} == {"meta"}
