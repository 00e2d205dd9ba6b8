"""A token at a time: the C++ operator against the definition, with an adapter and without; when it serves."""

import pytest
import torch

from rwkv_nb.config import LoraSettings
from rwkv_nb.lora.layers import attach, lora_layers, set_strength
from rwkv_nb.model import RWKV, State
from rwkv_nb.model.checkpoint import assemble
from rwkv_nb.model.token7 import TokenSteps


def adapted(model: RWKV, strength: float) -> RWKV:
    """The model with a random adapter on all linears."""
    attach(model, LoraSettings(4, 8.0), 0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.2)
    set_strength(model, strength)
    return model


def written(step, model: RWKV, tokens: list[int]) -> tuple[torch.Tensor, State]:
    """The last hidden state [C] and the state behind tokens that `step` reads one at a time."""
    state = model.zero_state(1)
    for token in tokens:
        hidden, state = step([token], state)
    return hidden.flatten().double(), State(*(part.double() for part in state))


def definition(model: RWKV):
    return lambda tokens, state: model.hidden(torch.tensor([tokens]), state, op="torch")


def away(a, b) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-5), (torch.bfloat16, None), (torch.float16, None)])
@pytest.mark.parametrize("head_size, strength, rank_v_layer0", [(16, None, 0), (48, 0.7, 5), (8, 0.0, 0)])
@torch.inference_mode()
def test_it_is_the_definition(lively, dtype, allowed, head_size, strength, rank_v_layer0):
    model = lively(n_embd=48, ffn_dim=112, head_size=head_size, rank_v_layer0=rank_v_layer0)
    model = (model if strength is None else adapted(model, strength)).to(dtype)
    tokens = torch.randint(1, 257, (20,)).tolist()
    steps = TokenSteps(model, "cpu")
    assert steps.fused
    hidden, state = written(steps, model, tokens)
    own_hidden, own_state = written(definition(model), model, tokens)
    right_hidden, right_state = written(definition(model.float()), model, tokens)
    for got, own, right in zip([hidden, *state], [own_hidden, *own_state], [right_hidden, *right_state], strict=True):
        assert away(got, right) <= (allowed or 1.5 * away(own, right) + 1e-4)


@torch.inference_mode()
def test_rows_together_and_alone(lively):
    model, tokens = lively(), torch.randint(1, 257, (6, 2)).tolist()
    steps, together, alone = TokenSteps(model), model.zero_state(2), [model.zero_state(1) for _ in range(2)]
    for pair in tokens:
        hidden, together = steps(pair, together)
        for row, token in enumerate(pair):
            own, alone[row] = steps([token], alone[row])
            assert away(own[0], hidden[row]) < 1e-5


@pytest.mark.parametrize("version, op", [("x070", "torch"), ("x060", "cpu"), ("x052", "auto")])
@torch.inference_mode()
def test_elsewhere_the_model_itself_serves(lively, version, op):
    model, tokens = lively(version), torch.randint(1, 257, (5,)).tolist()
    steps = TokenSteps(model, op)
    assert not steps.fused
    assert away(written(steps, model, tokens)[0], written(definition(model), model, tokens)[0]) < 1e-5


def test_weights_that_deepspeed_has_parted_are_left_to_it(lively):
    model = lively()
    model.ln_out.weight.ds_id = 0   # so does DeepSpeed mark them
    assert not TokenSteps(model, "cpu").fused


@torch.inference_mode()
def test_a_quantised_base_is_written_with(lively):
    pytest.importorskip("bitsandbytes")
    base = lively()
    model = assemble(base.shape, base.state_dict().items(), quant="int8").eval()
    tokens = torch.randint(1, 257, (5,)).tolist()
    assert away(written(TokenSteps(model), model, tokens)[0], written(definition(model), model, tokens)[0]) < 1e-5
