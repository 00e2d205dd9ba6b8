"""What every test shares: one thread, fresh random numbers that can be had again, a tiny base, a few documents."""

import json
import os
import random
import signal

import hypothesis
import pytest
import torch

from rwkv_nb.config import Settings, replace
from rwkv_nb.model import RWKV, Shape, init_weights, save_weights

# Files that take long, the longest first: pytest-xdist hands out whole files, and no worker shall be left alone with
# one of them at the end.
LONG = ("test_in_order", "test_nvcc", "test_pretend_gpu", "test_shrink", "test_wheel", "test_memory", "test_fla_op",
        "test_triton_op", "test_gpu_kernels", "test_part_memory", "test_wkv", "test_memory_bar",
        "test_launch", "test_rwkv", "test_panel_in_chromium", "test_kill", "test_build", "test_session", "test_live",
        "test_imports", "test_gpu_check", "test_quant")


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, help="the random inputs of an earlier run, which printed this number")


def pytest_configure(config):
    """A machine that does much else fails no test. All processes of pytest-xdist have the first one's seed."""
    if config.option.seed is None:
        config.option.seed = getattr(config, "workerinput", {}).get("seed", random.SystemRandom().randrange(10**6))
    # A shell's & has it ignored, and so would the programs that tests start and stop.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    slow = [hypothesis.HealthCheck.too_slow]
    hypothesis.settings.register_profile("house", deadline=None, suppress_health_check=slow)
    hypothesis.settings.load_profile("house")


def pytest_configure_node(node):
    node.workerinput["seed"] = node.config.option.seed


def pytest_report_header(config):
    return f"random inputs: --seed {config.option.seed}"


def pytest_collection_modifyitems(items):
    place = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """A test's random inputs follow from the seed, whatever ran before it: what fails once fails again."""
    seed = item.config.option.seed
    random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """For the tests and the programs that they start. Their models are tiny: more threads would mostly wait for each
    other, on a machine that does much else many times as long as they work."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Path of a random byte-vocabulary model: two blocks, 64 channels."""
    path = tmp_path_factory.mktemp("base") / "base.pth"
    save_weights(path, init_weights(RWKV(Shape(2, 64, 257, 16, 16, 16, 16, 128)), seed=1).state_dict())
    return path


@pytest.fixture(scope="session")
def newlines(tmp_path_factory):
    """Path of a byte-vocabulary model that writes newlines for ever: what ends its answers is the template."""
    model = init_weights(RWKV(Shape(1, 64, 257, 16, 16, 16, 16, 128)))
    with torch.no_grad():
        model.head.weight.zero_()
        model.ln_out.weight.zero_()
        model.ln_out.bias.fill_(1)
        model.head.weight[1 + ord("\n")] = 1
    path = tmp_path_factory.mktemp("newlines") / "newlines.pth"
    save_weights(path, model.state_dict())
    return path


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    """Path of a jsonl with 30 short chat documents of different lengths."""
    words = ["red", "green", "blue", "black", "white"]
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    lines = [f"User: {' '.join(rng.choices(words, k=rng.randint(1, 5)))}\n\nAssistant: {rng.choice(words)}"
             for _ in range(30)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


@pytest.fixture
def settings(base, chats):
    """Settings of a run of a few seconds; change them with config.replace."""
    return replace(Settings(), load_model=str(base), data_file=str(chats), ctx_len=64, r=4, lora_alpha=8.0,
                   lora_dropout=0.1, micro_bsz=4, epoch_count=3, warmup_steps=2, lr_init=1e-3, merge=0)
