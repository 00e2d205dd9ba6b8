"""Initial values as RWKV's authors publish them (RWKV-LM: train_temp, and rwkv_v6_demo for v6 and v5; arXiv 2503.14456,
appendix)."""

import math

import torch
from torch import nn

from .rwkv import RWKV


@torch.no_grad()
def init_weights(model: RWKV, seed: int = 42) -> RWKV:
    """Fill all parameters in place, from one seed; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    C, V = model.shape.n_embd, model.shape.vocab_size
    model.emb.weight.copy_(_uniform((V, C), 1e-4, generator))
    model.head.weight.copy_(_orthogonal((V, C), 0.5 * math.sqrt(max(V / C, 1)), generator))
    for layer, block in enumerate(model.blocks):
        for name, parameter in block.named_parameters():
            if ".ln" not in f".{name}":
                parameter.zero_()
        init_block = _init_x070 if model.shape.version == "x070" else _init_older
        init_block(block.att, block.ffn, model.shape, layer, generator)
    for name, module in model.named_modules():
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            module.weight.fill_(1)
            module.bias.zero_()
            if name.endswith("ln_x"):
                module.weight.fill_(((1 + int(name.split(".")[1])) / model.shape.n_layer) ** 0.7)
    return model


def _init_older(att, ffn, shape, layer: int, generator) -> None:
    """x060 and x052: the same values, under the one's names or the other's."""
    C, L, new = shape.n_embd, shape.n_layer, shape.version == "x060"
    from_0, towards_0 = layer / max(L - 1, 1), 1 - layer / L
    n = torch.arange(C)
    ramp = n / (C - 1)
    for part, name in [(att, c) for c in ("xwkvrg" if new else "kvrg")] + [(ffn, "k"), (ffn, "r")]:
        power = 0.5 if part is att and name in "rg" else 1
        own = (n / C) ** (towards_0 * power)
        if name == "v":
            own += 0.3 * from_0
        if new:
            getattr(part, f"time_maa_{name}").copy_(1 - own)
        else:
            getattr(part, f"time_mix_{name}").copy_(own)
    att.time_decay.copy_((-6 + 5 * ramp ** (0.7 + 1.3 * from_0)).view_as(att.time_decay))
    att.time_faaaa.copy_((from_0 * (1 - ramp) + 0.1 * ((n + 1) % 3 - 1)).view_as(att.time_faaaa))
    if new:
        for parameter in (att.time_maa_w2, att.time_decay_w2):
            parameter.copy_(_uniform(parameter.shape, 0.01, generator))
    for linear, gain in ((att.receptance, 1), (att.key, 0.1), (att.value, 1), (att.gate, 0.1), (ffn.key, 1)):
        linear.weight.copy_(_orthogonal(linear.weight.shape, gain, generator))


def _init_x070(att, ffn, shape, layer: int, generator) -> None:
    C, N, L = shape.n_embd, shape.head_size, shape.n_layer
    from_0, towards_0 = layer / max(L - 1, 1), 1 - layer / L
    n = torch.arange(C)
    ramp = n / (C - 1)
    for c, power in {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}.items():
        getattr(att, f"x_{c}").copy_(1 - (n / C) ** (power * towards_0))
    zigzag = (n % N - (N - 1) / 2) / ((N - 1) / 2)
    zigzag, linear = zigzag * zigzag.abs(), ramp - 0.5
    # from channels that forget at once to channels that keep long, within each head and over the layer
    att.w0.copy_(-5.5 + 6 * ramp ** (1 + from_0**0.3) + zigzag * 2.5)
    att.a0.copy_(-0.19 + zigzag * 0.3 + linear * 0.4)
    if hasattr(att, "v0"):
        att.v0.copy_(0.73 - linear * 0.4)
    for c in "wavg":
        if hasattr(att, f"{c}2"):
            up = getattr(att, f"{c}2")
            up.copy_(_orthogonal(up.shape, 0.1, generator))
    att.k_k.copy_(0.71 - linear * 0.1)
    att.k_a.fill_(1.02)
    att.r_k.fill_(-0.04)
    for name, width in {"receptance": 0.5, "key": 0.05, "value": 0.5}.items():
        getattr(att, name).weight.copy_(_uniform((C, C), width / math.sqrt(C), generator))
    ffn.x_k.copy_(1 - (n / C) ** towards_0**4)
    ffn.key.weight.copy_(_uniform(ffn.key.weight.shape, 0.5 / math.sqrt(C), generator))


def _uniform(shape, width: float, generator) -> torch.Tensor:
    return torch.empty(shape).uniform_(-width, width, generator=generator)


def _orthogonal(shape, gain: float, generator) -> torch.Tensor:
    return nn.init.orthogonal_(torch.empty(shape), gain=gain, generator=generator)
