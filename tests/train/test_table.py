"""Every row of the tutorial's table: what it changes in the training, not that it is stored."""

import math
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training import steps, train

from rwkv_nb.config import Settings, TrainSettings, replace
from rwkv_nb.errors import SettingsError, TrainingError
from rwkv_nb.lora.adapter import apply_adapter, load_adapter
from rwkv_nb.lora.layers import lora_layers, strength
from rwkv_nb.lora.merge import merge
from rwkv_nb.model import fingerprint, load_model, load_weights
from rwkv_nb.runs import Run
from rwkv_nb.train.loop import Trainer
from rwkv_nb.train.schedule import learning_rate


def trainer(tmp_path, settings, **changes):
    return Trainer(Run(tmp_path), replace(settings, **changes))


def losses(tmp_path, settings, n=3, **changes):
    """Losses of a run's first steps."""
    made = trainer(tmp_path, settings, **changes)
    return [made.train_step(made.settings.train.live)["loss"] for _ in range(n)]


def trained(tmp_path, settings, n=3, **changes):
    made = trainer(tmp_path, settings, **changes)
    for _ in range(n):
        made.train_step(made.settings.train.live)
    return made


# -- model and files -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, right, wrong", [
    ("my_testing", "x070", "x060"), ("n_layer", 2, 24), ("n_embd", 64, 768), ("vocab_size", 257, 65536)])
def test_shapes_are_read_and_only_checked(tmp_path, settings, name, right, wrong):
    trainer(tmp_path, settings, **{name: right})
    with pytest.raises(SettingsError, match=f"{name} is {wrong}, base.pth has {right}"):
        trainer(tmp_path, settings, **{name: wrong})


def test_epoch_count_and_epoch_save_and_merge(tmp_path, settings):
    train(tmp_path, replace(settings, epoch_count=4, epoch_save=3, epoch_steps=2, merge=1))
    assert {p.name for p in tmp_path.glob("rwkv-*.pth")} == {"rwkv-3.pth", "rwkv-4.pth"}
    assert {p.name for p in Run(tmp_path).adapters()} == {"adapter-3.safetensors", "adapter-4.safetensors"}
    assert len(steps(Run(tmp_path).metrics())) == 4 * 2
    train(tmp_path, replace(settings, epoch_count=1, epoch_steps=1, merge=0))
    assert len(Run(tmp_path).adapters()) == 1 and not list(tmp_path.glob("rwkv-*.pth"))


def test_ctx_len_and_micro_bsz_shape_the_batch(tmp_path, settings):
    for batch in trainer(tmp_path, settings, ctx_len=9, micro_bsz=3).batches.next_step():
        assert batch.inputs.shape[0] == 3 and batch.inputs.shape[1] <= 9


def test_dataload_and_loss_mask_shape_what_is_trained(tmp_path, settings):
    def first(**changes):
        return trainer(tmp_path, settings, **{"ctx_len": 12, "micro_bsz": 3, "loss_mask": "none"} | changes).batches

    packed, alone, slices = (first(dataload=how).next_step()[0] for how in ("pack", "only", "get"))
    assert packed.starts.sum() > 1 and len(packed.inputs) == 1 and packed.inputs.shape[1] > 2 * 12
    assert len(alone.inputs) == 1 and alone.starts is None
    assert slices.inputs.shape == (3, 12)
    assert len(first(dataload="split").items) > len(first(dataload="pad").items) == 30
    all_, answers = (first(loss_mask=mask, ctx_len=64).next_step()[0].mask.sum() for mask in ("none", "template"))
    assert 0 < answers < all_


# -- the adapter -----------------------------------------------------------------------------------------------------

def test_r_alpha_and_target_modules(tmp_path, settings):
    made = trainer(tmp_path, settings, r=6, lora_alpha=24.0, target_modules=("att.key",))
    layers = lora_layers(made.model)
    assert list(layers) == ["blocks.0.att.key", "blocks.1.att.key"]
    layer, x = layers["blocks.0.att.key"].eval(), torch.randn(3, 64)
    assert layer.lora_A.shape == (6, 64)
    torch.nn.init.normal_(layer.lora_B)
    torch.testing.assert_close(layer(x), x @ (layer.weight + 4 * layer.lora_B @ layer.lora_A).T, rtol=1e-4, atol=1e-4)


def test_dropout_drops(tmp_path, settings):
    assert losses(tmp_path, settings, lora_dropout=0.0) != losses(tmp_path, settings, lora_dropout=0.5)
    assert losses(tmp_path, settings, 1, lora_dropout=0.0) == losses(tmp_path, settings, 1, lora_dropout=0.5)  # B = 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_train_parts_move_are_saved_and_merged(tmp_path, settings, base, precision):
    made = trained(tmp_path, settings, train_parts=("ln",), precision=precision, lr_init=1e-3)
    path, = made.save("x")
    weights, adapter = load_weights(base), load_adapter(path)
    norms = [key for key in weights if "ln" in key]
    assert sorted(adapter.parts) == sorted(norms)
    assert all(not torch.equal(adapter.tensors[key], weights[key].float()) for key in norms if "ln0" not in key)
    merge(base, path, tmp_path / "merged.pth")
    merged = load_model(tmp_path / "merged.pth", dtype=torch.float32)
    model, tokens = load_model(base, dtype=torch.float32).eval(), torch.randint(1, 257, (2, 9))
    before = model(tokens)[0]
    apply_adapter(model, adapter, fingerprint(base))
    after = model(tokens)[0]
    torch.testing.assert_close(merged(tokens)[0], after, rtol=1e-3, atol=1e-4)
    with strength(model, 0):
        assert torch.equal(model(tokens)[0], before)
    assert torch.equal(model(tokens)[0], after)
    with pytest.raises(SettingsError, match="(?s)train_parts.*did you mean ln_x"):
        trainer(tmp_path, settings, train_parts=("lnx",))


# -- learning rate and optimizer -------------------------------------------------------------------------------------

def rates(total=100, **changes):
    return [learning_rate(step, total, replace(TrainSettings(), lr_init=1.0, lr_final=0.1, **changes))
            for step in range(total)]


def test_warmup_then_a_cosine_to_lr_final():
    got = rates(warmup_steps=4)
    assert got[:4] == [0.25, 0.5, 0.75, 1.0]
    assert got[-1] == pytest.approx(0.1) and got[4 + (99 - 4) // 2] == pytest.approx(0.55, abs=0.01)
    assert all(a >= b for a, b in zip(got[4:], got[5:], strict=False))


def test_wsd_is_stable_and_then_decays():
    got = rates(warmup_steps=4, lr_schedule="wsd", decay_steps=20)
    assert set(got[3:80]) == {1.0}
    assert got[-1] == pytest.approx(0.1)
    falls = [a - b for a, b in zip(got[79:], got[80:], strict=False)]
    assert falls == pytest.approx([0.9 / 20] * 20)
    assert rates(warmup_steps=0, lr_schedule="wsd").count(1.0) == 90      # by default the last tenth falls


def test_the_schedule_may_end_before_the_run():
    assert rates(warmup_steps=0, lr_end=50)[49:] == pytest.approx([0.1] * 51)


def test_the_step_is_adamw_with_the_table_s_numbers(tmp_path, settings):
    """Each of lr, beta1, beta2, adam_eps, weight_decay against AdamW's own formula, on a second step."""
    numbers = {"lr_init": 0.01, "lr_final": 0.01, "beta1": 0.7, "beta2": 0.8, "adam_eps": 1e-3, "weight_decay": 0.2}
    made = trainer(tmp_path, settings, warmup_steps=4, **numbers, grad_clip=0.0, lora_dropout=0.0)
    parameter, gradients = made.parameters[0], []
    made.parameters[1].data.normal_()                # B: else A has no gradient at first
    expected, m, v = parameter.detach().clone(), 0, 0
    parameter.register_post_accumulate_grad_hook(lambda p: gradients.append(p.grad.clone()))
    for t in (1, 2):
        made.train_step(made.settings.train.live)
        g = gradients[-1]
        m, v = 0.7 * m + 0.3 * g, 0.8 * v + 0.2 * g * g
        expected *= 1 - 0.01 * t / 4 * 0.2               # t of four steps into the warm-up
        expected -= 0.01 * t / 4 * (m / (1 - 0.7**t)) / ((v / (1 - 0.8**t)).sqrt() + 1e-3)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)


def test_grad_clip_bounds_the_gradient(tmp_path, settings):
    """A large adam_eps makes AdamW's first step lr · gradient / adam_eps."""
    for clip in (1e-3, 0.0):
        made = trainer(tmp_path, settings, grad_clip=clip, adam_eps=1e4, warmup_steps=0, lr_init=1.0, lr_final=1.0)
        before = [p.detach().clone() for p in made.parameters]
        norm = made.train_step(made.settings.train.live)["grad_norm"]
        moved = math.sqrt(sum(float((p.data - b).square().sum()) for p, b in zip(made.parameters, before, strict=True)))
        assert norm > 1e-2 and 1e4 * moved == pytest.approx(clip or norm, rel=1e-2)


# -- arithmetic ------------------------------------------------------------------------------------------------------

def test_precision_is_the_base_s_dtype(tmp_path, settings):
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        made = trainer(tmp_path, settings, precision=precision)
        assert made.model.head.weight.dtype == dtype and made.parameters[0].dtype == torch.float32
    with pytest.raises(SettingsError, match="GPU's arithmetic"):
        trainer(tmp_path, settings, precision="tf32", accelerator="cpu")


def test_fp16_trains_and_its_loss_scale_comes_down_where_it_overflows(tmp_path, settings):
    plain, half = (trained(tmp_path, settings, 8, precision=p, lora_dropout=0.0) for p in ("fp32", "fp16"))
    assert half.epoch_loss[0] == pytest.approx(plain.epoch_loss[0], rel=0.01)
    half.optimizer.scale = 2.0**40
    row = half.train_step(half.settings.train.live)
    assert math.isfinite(row["grad_norm"]) and 1 <= half.optimizer.scale < 2.0**40
    assert half.step == 9


def test_op_and_accelerator_say_what_computes(tmp_path, settings):
    made = trainer(tmp_path, settings, op="torch", accelerator="cpu")
    assert made.op == "torch" and made.device.type == "cpu"
    assert losses(tmp_path, settings, op="torch") == pytest.approx(losses(tmp_path, settings, op="chunked"), rel=1e-4)
    if not torch.cuda.is_available():
        with pytest.raises(SettingsError, match="no GPU"):
            trainer(tmp_path, settings, accelerator="gpu")


def operations(made):
    """How often each operator ran in one step."""
    seen = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen[func.namespace + "." + func._opname] += 1
            return func(*args, **(kwargs or {}))

    with Count():
        made.train_step(made.settings.train.live)
    return seen


def test_op_and_grad_cp_decide_what_runs(tmp_path, settings):
    """Two layers in one micro-batch: block computes each WKV twice, selective only what is around it."""
    plain, selective, block, steps_ = (operations(trainer(tmp_path, settings, **changes)) for changes in (
        {"op": "cpu"}, {"op": "cpu", "grad_cp": "selective"}, {"op": "cpu", "grad_cp": "block"}, {"op": "torch"}))
    wkv, = (name for name in plain if name.startswith("rwkv_nb") and "backward" not in name)
    assert [ran[wkv] for ran in (plain, selective, block, steps_)] == [2, 2, 4, 0]
    assert plain["aten.mm"] < selective["aten.mm"] == block["aten.mm"]


def test_what_is_held_in_fewer_bytes_or_elsewhere(tmp_path, settings):
    made = trainer(tmp_path, settings, quant="nf4", quant_head=1, emb_cpu=1)
    held = [layer.held.kind for layer in lora_layers(made.model).values()]
    assert set(held) == {"nf4"} and made.model.head.held.kind == "int8" and made.model.emb.weight.device.type == "cpu"
    plain = trainer(tmp_path, settings)
    assert all(layer.held is None for layer in lora_layers(plain.model).values()) and plain.model.head.weight.numel()


def test_truncated_bptt_learns_something_else(tmp_path, settings):
    exact, truncated = (losses(tmp_path, settings, 6, chunk_ctx=8, truncated_bptt=cut, lr_init=3e-2, lora_dropout=0.0)
                        for cut in (0, 1))
    assert exact[0] == truncated[0] and abs(exact[-1] / truncated[-1] - 1) > 1e-5


def test_random_seed_decides_order_and_adapter(tmp_path, settings):
    one, again, other = (trainer(tmp_path, settings, random_seed=seed) for seed in (1, 1, 2))
    order = [[made.batches.next_step()[0].inputs.tolist() for _ in range(3)] for made in (one, again, other)]
    assert order[0] == order[1] != order[2]
    assert torch.equal(one.parameters[0], again.parameters[0])
    assert not torch.equal(one.parameters[0], other.parameters[0])


# -- what is not a number, and spikes --------------------------------------------------------------------------------

def test_a_spike_stops_or_is_skipped_and_told(tmp_path, settings):
    for on_spike in ("stop", "skip"):
        made = trained(tmp_path, settings, 12, on_spike=on_spike, spike_factor=1.5, lora_dropout=0.0)
        before = [p.detach().clone() for p in made.parameters]
        made.model.head.weight.data.mul_(-30)
        if on_spike == "stop":
            with pytest.raises(TrainingError, match="spike"):
                made.train_step(made.settings.train.live)
        else:
            row = made.train_step(made.settings.train.live)
            assert row["event"] == "skip" and "spike" in row["why"] and made.step == 13
        assert all(torch.equal(a, b) for a, b in zip(before, made.parameters, strict=True))


def test_skipping_has_an_end(tmp_path, settings):
    made = trainer(tmp_path, settings, on_spike="skip", epoch_steps=100)
    made.model.head.weight.data.fill_(math.nan)
    rows = []
    with pytest.raises(TrainingError, match="not a number"):
        for _ in range(100):
            rows.append(made.train_step(made.settings.train.live))
    assert 1 < len(rows) < 20 and all(row["event"] == "skip" for row in rows)


# -- live ------------------------------------------------------------------------------------------------------------

def test_accumulation_may_change_and_no_document_is_missed(tmp_path, settings):
    made, live, tokens = trainer(tmp_path, settings, epoch_count=2), settings.train.live, 0
    once = sum(int(made.documents[i].mask[1:].sum()) for i in range(len(made.documents)))
    while made.step < made.total_steps:
        tokens += made.train_step(replace(live, accumulate_grad_batches=1 + made.step % 3))["tokens"]
        if made.epoch_ended:
            assert tokens == once * made.epoch
    assert made.epoch == 2


def test_defaults_together_are_sound():
    from rwkv_nb.config import check_together

    check_together(Settings())
    for changes in ({"decay_steps": 3}, {"lr_end": 5}):
        with pytest.raises(SettingsError):
            check_together(replace(Settings(), **changes))


