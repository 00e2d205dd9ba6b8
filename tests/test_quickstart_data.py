"""The embedded default is honest: what is held out is nowhere in what is trained, and no simple rule answers it."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch

from rwkv_nb.data.sources import read_jsonl
from rwkv_nb.evaluate import exact_match, split_example
from rwkv_nb.model import load_model, load_weights, read_shape
from rwkv_nb.tokenizer import get_tokenizer

SAMPLES = Path(__file__).parents[1] / "data_samples"
BASE = SAMPLES / "tiny_base.pth"


def texts(name: str) -> list[str]:
    return [text for _, text in read_jsonl(SAMPLES / f"{name}.jsonl")]


@pytest.fixture(scope="module")
def train():
    return texts("quickstart_train")


@pytest.fixture(scope="module")
def heldout():
    return texts("quickstart_heldout")


@pytest.fixture(scope="module")
def make_texts():
    spec = importlib.util.spec_from_file_location("make_texts", SAMPLES / "make_texts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_makes_the_committed_files(make_texts, train, heldout):
    assert make_texts.quickstart() == (train, heldout)
    assert make_texts.general() == texts("general_heldout")
    lines = (SAMPLES / "quickstart_choices.jsonl").read_text(encoding="utf-8").splitlines()
    assert make_texts.choices(heldout) == [json.loads(line) for line in lines]


def test_no_held_out_person_is_in_the_training_text(train, heldout):
    joined = "\n".join(train)
    assert len(set(heldout)) == len(heldout) >= 100
    for text in heldout:
        prompt, answer = split_example(text)
        facts = json.loads(answer)
        assert answer not in joined and facts["name"] not in joined
        assert all(str(fact) in prompt for fact in facts.values())


def test_half_of_the_held_out_names_are_new_in_every_part(make_texts, train, heldout):
    base_words = {word for words in make_texts.WORDS.values() for word in words}
    held = make_texts.HELD
    assert not base_words & {word for words in held.values() for word in words}
    assert not set(make_texts.COMMON) & set(held["surname"] + held["given"])
    joined = "\n".join(train) + "\n" + "\n".join(itertools.islice(make_texts.base_text(1), 20_000))
    assert not any(f" {word} " in joined for word in held["first"] + held["last"])
    names = [json.loads(split_example(text)[1])["name"] for text in heldout]
    new = [name for name in names if all(part in held["first"] + held["last"] for part in name.split())
           or all(c in held["surname"] + held["given"] for c in name)]
    assert len(new) == len(heldout) / 2


def test_the_base_was_never_shown_the_answers_form(make_texts):
    documents = itertools.islice(make_texts.base_text(1), 20_000)
    assert not any('{"' in text or '": ' in text for text in documents)


def test_simple_rules_score_below_a_tenth(train, heldout):
    assert constant_baseline(train, heldout) < 0.1
    assert nearest_neighbour_baseline(train, heldout) < 0.1


def test_the_base_scores_below_a_tenth(heldout):
    model = load_model(BASE, dtype=torch.float32)
    tokenizer = get_tokenizer("auto", model.shape.vocab_size)
    score = exact_match(model, tokenizer, heldout)
    assert score.n == len(heldout) and score.share < 0.1


def test_the_base_is_small_and_of_byte_vocabulary():
    shape = read_shape(load_weights(BASE))
    assert (shape.vocab_size, shape.head_size) == (257, 64) and shape.n_layer >= 2
    assert sum(f.stat().st_size for f in SAMPLES.iterdir() if f.is_file()) < 8e6


def test_the_rwkv_package_reads_the_base_alike(tmp_path):
    tokens = [byte + 1 for byte in "Anna Berg lives in Oslo. 张伟住在北京。 Where does Anna live?".encode()]
    script = ("import sys, torch; from rwkv.model import RWKV; "
              f"logits = RWKV(sys.argv[1], 'cpu fp32').forward({tokens}, None, full_output=True)[0]; "
              "torch.save(logits.float(), sys.argv[2])")
    environment = {**os.environ, "RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    subprocess.run([sys.executable, "-c", script, BASE.with_suffix(""), tmp_path / "theirs.pt"], check=True,
                   env=environment, capture_output=True)
    with torch.inference_mode():
        ours = load_model(BASE, dtype=torch.float32)(torch.tensor([tokens]))[0][0]
    torch.testing.assert_close(ours, torch.load(tmp_path / "theirs.pt"), atol=1e-4, rtol=1e-4)


# -- what a simple rule would score ----------------------------------------------------------------------------------

def constant_baseline(train: list[str], heldout: list[str]) -> float:
    """Share of held-out answers that the commonest training answer gets right. Texts without a marker are left out."""
    (best, _), = Counter(split_example(text)[1] for text in train if "Assistant:" in text).most_common(1)
    return sum(split_example(text)[1] == best for text in heldout) / len(heldout)


def nearest_neighbour_baseline(train: list[str], heldout: list[str]) -> float:
    """Share that is right when each prompt gets the answer of the training prompt most like it.

    Likeness: shared character trigrams over the number that either has (Jaccard's index). Training texts without a
    marker are left out.
    """
    pairs = [split_example(text) for text in train if "Assistant:" in text]
    sizes, holders = [], defaultdict(list)
    for i, (asked, _) in enumerate(pairs):
        grams = _trigrams(asked)
        sizes.append(len(grams))
        for gram in grams:
            holders[gram].append(i)
    right = 0
    for asked, answer in (split_example(text) for text in heldout):
        grams = _trigrams(asked)
        shared = Counter(i for gram in grams for i in holders[gram])
        nearest = max(shared, key=lambda i: shared[i] / (len(grams) + sizes[i] - shared[i]), default=0)
        right += pairs[nearest][1] == answer
    return right / len(heldout)


def _trigrams(text: str) -> set[str]:
    return {text[i:i + 3] for i in range(len(text) - 2)}


def test_baselines():
    train = ["User: I have a red cat\n\nAssistant: cat", "User: I see two dogs\n\nAssistant: dog",
             "User: my cat is old\n\nAssistant: cat"]
    heldout = ["User: I see three dogs\n\nAssistant: dog", "User: a red cat!\n\nAssistant: cat",
               "User: one horse\n\nAssistant: horse", "User: the cat is old\n\nAssistant: cat"]
    assert constant_baseline(train, heldout) == 0.5
    assert nearest_neighbour_baseline(train, heldout) == 0.75
