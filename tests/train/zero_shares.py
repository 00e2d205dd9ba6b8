"""One of two processes: one step under each of DeepSpeed's stages, and what it holds then. test_deepspeed starts it."""

import json
import sys
from pathlib import Path

from rwkv_nb.config import Settings, from_dict, replace
from rwkv_nb.runs import Run
from rwkv_nb.train.loop import Trainer
from rwkv_nb.train.ranks import JoinedRanks


def held(ranks, folder, settings):
    """The share of the weights, and of AdamW's averages, that is in this process after a step."""
    trainer = Trainer(Run(folder), settings, ranks)
    weights, trained = (sum(p.numel() for p in some) for some in (trainer.model.parameters(), trainer.parameters))
    trainer.train_step(settings.train.live)
    mine = sum((p if p.numel() else p.ds_tensor).numel() for p in trainer.model.parameters())
    averages = [t for state in trainer.optimizer.adamw.state.values() for t in state.values() if t.numel() > 1]
    return mine / weights, sum(t.numel() for t in averages) / (2 * trained)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    settings = from_dict(Settings, json.loads((folder / "settings.json").read_text()))
    ranks = JoinedRanks(0, gpu=False)
    told = {strategy: held(ranks, folder, replace(settings, strategy=strategy)) for strategy in sys.argv[2:]}
    (folder / f"held-{ranks.rank}.json").write_text(json.dumps(told))
