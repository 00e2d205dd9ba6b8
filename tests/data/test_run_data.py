"""From files to what the processes of a run see: held out, repeated, mixed, shared, interrupted and gone on."""

import collections
import json
import random

import pytest
from token_files import write_binidx

from rwkv_nb.config import DataSettings
from rwkv_nb.data.batches import Batches
from rwkv_nb.data.sources import open_split
from rwkv_nb.tokenizer import ByteTokenizer

BYTE = ByteTokenizer()
CTX = 24


def seen(batches):
    """Each row's trained text, counted; what is packed into one row, apart."""
    found = collections.Counter()
    for _, targets, mask, starts in batches:
        for i in range(len(targets)):
            cuts = [0, len(targets[i])] if starts is None else [*starts[i].nonzero()[:, 0].tolist(), len(targets[i])]
            found.update(BYTE.decode(targets[i, a:b][mask[i, a:b]].tolist())
                         for a, b in zip(cuts, cuts[1:], strict=False) if mask[i, a:b].any())
    return found


@pytest.mark.parametrize("dataload", ["split", "pack", "pad", "only"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_an_epoch_holds_what_the_settings_say(tmp_path, dataload, ranks):
    texts = [[f"{name}{i}" + "x" * random.randint(0, 2 * CTX if dataload == "split" else CTX - 6) for i in range(n)]
             for name, n in (("a", 20), ("b", 12))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[0]))
    write_binidx(tmp_path / "b", [[*BYTE.encode(text), 0] for text in texts[1]])
    data = DataSettings(str(tmp_path / "a"), template="plain", heldout=0.25, repeat=2.0,
                        mix_file=str(tmp_path / "b"), mix_share=0.3)
    train, heldout = open_split(data, BYTE)
    kept = set(texts[0]) - {BYTE.decode(d.tokens) for d in heldout}
    assert len(heldout) == 5 and len(kept) == 15
    counts = collections.Counter(BYTE.decode(d.tokens) for d in train)
    assert {text: n for text, n in counts.items() if text in texts[0]} == dict.fromkeys(kept, 2)
    assert set(counts) <= kept | set(texts[1])

    pieces = collections.Counter()  # by hand: the first byte is no target, then CTX tokens at a time, the 0 as ""
    for text, n in counts.items():
        for at in range(0, len(text), CTX):
            pieces[text[at + 1:at + 1 + CTX]] += n

    def batches(rank):
        return Batches(open_split(data, BYTE)[0], ctx_len=CTX, micro_bsz=2, accumulate=1, seed=5, dataload=dataload,
                       rank=rank, world_size=ranks)

    stop = random.randint(0, batches(0).steps_per_epoch)
    found = collections.Counter()
    for rank in range(ranks):
        first, second = batches(rank), batches(rank)
        for _ in range(stop):
            found += seen(first.next_step())
        second.load(json.loads(json.dumps(first.state())))
        for _ in range(second.steps_per_epoch - stop):
            found += seen(second.next_step())
    assert found == pieces
