"""A talk with a model, turn by turn: all that is kept is its state, so memory and time a token stay as they are."""

from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save

from .data.chat import prompt
from .errors import CheckpointError
from .generate import eval_mode, read, stream
from .model import RWKV, State
from .model.ai00 import read_safetensors
from .runs import write_bytes

FORMAT = "rwkv_nb state"


class Talk:
    """What one model has read and written so far. The model may be shared: nothing of the talk is in it."""

    def __init__(self, model: RWKV, tokenizer, template: str = "chat", *, op: str = "auto"):
        self.model, self.tokenizer, self.template, self.op = model, tokenizer, template, op
        self.state: State | None = None

    def say(self, text: str, *, max_tokens: int = 300, **sampling) -> Iterator[str]:
        """The answer, in pieces as they come; sampling as in generate.stream.

        An answer that is not taken to its end (the iterator is closed) is remembered as far as it was written.
        """
        asked = ("" if self.state is None else "\n\n") + prompt(text, self.template)
        ids, answer = self.tokenizer.encode(asked) or [0], ""
        before = self._read(ids[:-1], self.state)
        try:
            for piece in stream(self.model, self.tokenizer, ids[-1:], max_tokens=max_tokens, state=before,
                                template=self.template, op=self.op, **sampling):
                answer += piece
                yield piece
        finally:    # read again as text: what was written behind the stop is not part of the talk
            self.state = self._read(ids[-1:] + self.tokenizer.encode(answer), before)

    def _read(self, ids: list[int], state: State | None) -> State | None:
        with eval_mode(self.model):
            return read(self.model, ids, state, op=self.op)[1]

    def save(self, path: str | Path) -> None:
        """Write the state, to go on from later or elsewhere: a safetensors file, the same size after any talk."""
        state = self.state or self.model.zero_state(1)
        data = save({name: part.cpu().clone() for name, part in state._asdict().items()}, {"format": FORMAT})
        write_bytes(Path(path), data)

    def restore(self, path: str | Path) -> None:
        """Go on from a saved state. Raises CheckpointError for another kind of file, or one of another model's size."""
        path, zero = Path(path), self.model.zero_state(1)
        if not path.is_file():
            raise CheckpointError("there is no such file", where=path, fix="save a talk first")
        parts, words = read_safetensors(path)
        sizes = {name: (part.shape, part.is_floating_point()) for name, part in parts.items()}
        if words.get("format") != FORMAT or sizes != {n: (p.shape, True) for n, p in zero._asdict().items()}:
            raise CheckpointError("this is not the state of a talk with a model of this size", where=path,
                                  fix="load the model that it was saved from")
        self.state = State(**{name: parts[name].to(own) for name, own in zero._asdict().items()})
