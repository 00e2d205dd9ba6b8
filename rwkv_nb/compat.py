"""RWKV-PEFT's run_lora.sh and flags, for people who come from there."""

import itertools
import os
import re
import shlex
from collections.abc import Iterator
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
    """The arguments that a shell script gives to train.py, its variables and the environment's filled in. Nothing is
    run.

    Raises SettingsError, with file:line, for a script without train.py, a variable that is not set, and shell that goes
    beyond assignments.
    """
    path = Path(path)
    if not path.is_file():
        raise SettingsError("there is no such script", where=path, fix="check the path")
    variables = dict(os.environ)
    for number, text in _whole_lines(path):
        where = f"{path}:{number}"
        for command in _commands(text, where):
            words = [_fill(word, variables, where) for word in command if word != "export"]
            assigned = [re.fullmatch(r"(\w+)(\+?)=(.*)", word, re.DOTALL) for word in words]
            script = next((i for i, word in enumerate(words) if Path(word).name == "train.py"), len(words))
            if "".join(words[script + 1:]).startswith(("-", "$", "`")):   # others look whether it is there
                if beyond := next((word for word in words if "$" in word or "`" in word), ""):
                    raise SettingsError(f"{beyond!r} would have to be run", where=where, fix="write its result there")
                return [os.path.expanduser(word) for word in words[script + 1:]]
            for name, more, value in map(re.Match.groups, assigned) if all(assigned) else ():
                variables[name] = (variables.get(name, "") if more else "") + os.path.expanduser(value)
    raise SettingsError("this script does not start train.py", where=path, fix="give a run_lora.sh of RWKV-PEFT")


def _whole_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of each line, those that end in a backslash joined; an option in between may be commented out."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise SettingsError("this script is not UTF-8", where=path, fix="save it as UTF-8 in a text editor") from error
    began, text = 1, ""
    for number, line in enumerate(lines, 1):
        if not text:
            began = number
        if not (text and line.lstrip().startswith("#")):
            text += line.rstrip().removesuffix("\\") + " "
        if not line.rstrip().endswith("\\"):
            yield began, text
            text = ""
    yield began, text


def _commands(text: str, where: str) -> list[list[str]]:
    """The words of each command in a line, without their redirections' signs."""
    text = re.sub(r"(?<=\s)\d(?=>)", "", text)
    text = re.sub(r"(?<=[^\s;&|])#", "\0", text)     # inside a word it begins no comment, as shlex would have it
    reader = shlex.shlex(text, posix=True, punctuation_chars=True)
    reader.whitespace_split = True
    try:
        words = [word.replace("\0", "#") for word in reader]
    except ValueError as error:
        raise SettingsError(f"this line cannot be read ({error})", where=where, fix="close its quotes") from error
    ends = [i for i, word in enumerate(words) if re.fullmatch(r"[();<>|&]+", word)]     # of a command, or its arguments
    return [words[a + 1:b] for a, b in itertools.pairwise([-1, *ends, len(words)])]


def _fill(word: str, variables: dict[str, str], where: str) -> str:
    def value(match) -> str:
        name, otherwise = match[1] or match[2], match[3]
        if name not in variables and otherwise is None:
            raise SettingsError(f"the variable {name} is not set in this script", where=where,
                                fix="write its value there" if name.isdigit() else f"write a line {name}=… above")
        return variables.get(name) or otherwise or ""

    return re.sub(r"\$(?:(\w+)|\{(\w+)(?::?-([^}]*))?\})", value, word)
