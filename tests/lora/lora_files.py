"""A base in which every layer takes part (initialisation leaves half of them at zero), and an adapter of it."""

import torch

from rwkv_nb.config import LoraSettings
from rwkv_nb.lora.adapter import save_adapter
from rwkv_nb.lora.layers import adapter_parameters, attach
from rwkv_nb.lora.meta import AdapterMeta
from rwkv_nb.model import RWKV, Shape, fingerprint, init_weights, load_model, save_weights

LORA = LoraSettings(r=4, lora_alpha=12.0)
TARGETS = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")  # what it means for x070


@torch.no_grad()
def make_base(path, *, seed=0, dtype=torch.float32, n_layer=2, n_embd=64, vocab_size=257):
    """Write a random base; returns its path."""
    model = init_weights(RWKV(Shape(n_layer, n_embd, vocab_size, 16, 16, 16, 32, 4 * n_embd)), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(("emb.weight", "output.weight", "ffn.value.weight")):
            parameter += parameter.shape[-1] ** -0.5 * torch.randn(parameter.shape, generator=generator)
    save_weights(path, model.to(dtype).state_dict())
    return path


@torch.no_grad()
def make_adapter(path, base_path, *, lora=LORA, seed=0, quant="none"):
    """Write an adapter of the base as if it had been trained; returns its path and the model that it belongs to."""
    model = load_model(base_path, dtype=torch.float32)
    attach(model, lora, seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(model):
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    save_adapter(path, model, AdapterMeta(lora.r, lora.lora_alpha, lora.target_modules, model.shape,
                                          fingerprint(base_path), base_path.name, "chat", "byte", 2, 34, quant))
    return path, model.eval()
