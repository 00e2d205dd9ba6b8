"""RWKV-PEFT's run_lora.sh and flags, for people who come from there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from .errors import SettingsError

# Flags of its train.py that have no counterpart, and what to do instead.
ELSEWHERE = {
    "--epoch_begin": "leave it out: a run goes on from its own checkpoint, --start resume insists on it",
    "--data_shuffle": "leave it out: the order is shuffled by --random_seed",
    "--fla": "use --op fla",
    "--train_type": "leave it out; for infctx set --chunk_ctx, for instance to 1024",
    "--lora_config": """use --peft_config '{"r":32,"lora_alpha":64,"lora_dropout":0.01}'""",
    "--rwkv_version": "use --my_testing, or leave it out: the version is read from the base",
    "--lora": "leave it out: --peft lora is all there is",
    "--lora_r": "use --r",
    "--lora_parts": "use --target_modules and --train_parts",
    "--lora_load": "leave it out: a run goes on from its own checkpoint",
    "--dim_att": "leave it out: it is read from the base", "--dim_ffn": "leave it out: it is read from the base",
    "--head_size_a": "leave it out: it is read from the base", "--pre_ffn": "leave it out", "--head_qk": "leave it out",
    "--avg_loss": "leave it out: the loss is the mean over a step's trained tokens whatever the accumulation",
    "--optim": "leave it out: AdamW is used",
}


def read_script(path: str | Path) -> list[str]:
    """The arguments that a shell script gives to train.py, its variables filled in. Nothing is run.

    Raises SettingsError, with file:line, for a script without train.py, a variable that it does not set, and shell
    that goes beyond assignments.
    """
    path = Path(path)
    if not path.is_file():
        raise SettingsError("there is no such script", where=path, fix="check the path")
    variables = {}
    for number, text in _whole_lines(path):
        try:
            words = shlex.split(text, comments=True)
        except ValueError as error:
            raise SettingsError(f"this line cannot be read ({error})", where=f"{path}:{number}",
                                fix="close its quotes") from error
        words = [_fill(word, variables, f"{path}:{number}") for word in words]
        assigned = [re.fullmatch(r"(\w+)=(.*)", word, re.DOTALL) for word in words if word != "export"]
        script = next((i for i, word in enumerate(words) if word.endswith("train.py")), None)
        if script is not None:
            if beyond := [word for word in words if "$" in word or "`" in word]:
                raise SettingsError(f"{beyond[0]!r} would have to be run", where=f"{path}:{number}",
                                    fix="write its result there")
            return words[script + 1:]
        if all(assigned):
            variables |= {match[1]: match[2] for match in assigned}
    raise SettingsError("this script does not start train.py", where=path, fix="give a run_lora.sh of RWKV-PEFT")


def _whole_lines(path: Path):
    """(number, text) of each line, those that end in a backslash joined."""
    began, text = 1, ""
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        began = began if text else number
        if line.rstrip().endswith("\\"):
            text += line.rstrip()[:-1] + " "
            continue
        yield began, text + line
        text = ""
    yield began, text


def _fill(word: str, variables: dict[str, str], where: str) -> str:
    def value(match) -> str:
        name = match[1] or match[2]
        if name not in variables:
            raise SettingsError(f"the variable {name} is not set in this script", where=where,
                                fix=f"write a line {name}=… above")
        return variables[name]

    return re.sub(r"\$(?:(\w+)|\{(\w+)\})", value, word)
