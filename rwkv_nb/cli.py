"""rwkv-nb: the notebooks' engine from a shell, under the tutorial's names.

Flags are made from the settings' fields (config.py), so that their text is written once.
"""

import argparse
import json
import os
import shlex
import signal
import sys
import time
from functools import partial

from . import __version__, compat, config
from .config import DataSettings, LoraSettings, Settings
from .errors import RwkvNbError, SettingsError, did_you_mean
from .runs import Run
from .words import duration_text


class _Parser(argparse.ArgumentParser):
    """argparse that raises SettingsError, and answers a mistyped flag with the nearest one of its command."""

    def parse_known_args(self, *args, **kwargs):
        arguments, rest = super().parse_known_args(*args, **kwargs)
        if rest:
            wrong = rest[0].partition("=")[0]
            if wrong in compat.ELSEWHERE:
                raise SettingsError(f"{wrong} is not needed here", where=self.prog, fix=compat.ELSEWHERE[wrong])
            raise SettingsError(f"there is no option {wrong}", where=self.prog,
                                fix=did_you_mean(wrong, self._option_string_actions, f"see {self.prog} --help"))
        return arguments, rest

    def error(self, message: str):
        raise SettingsError(message, where=self.prog, fix=f"see {self.prog} --help")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 1 where it failed, with the reason on stderr."""
    try:
        arguments = parser().parse_args(argv)
        return arguments.command(arguments) or 0
    except RwkvNbError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
    except BrokenPipeError:     # of `rwkv-nb settings | head`: Python would complain again as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def parser() -> argparse.ArgumentParser:
    """Every command with its flags; parse_args raises SettingsError, with the nearest right name."""
    exact = partial(_Parser, allow_abbrev=False)
    parser = exact(prog="rwkv-nb", description="LoRA fine-tuning of RWKV.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=exact)

    def command(name: str, do, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(command=do)
        return made

    train = command("train", _train, "fine-tune a base model; without --load_model and --data_file, the settings.json "
                                     "of proj_dir is the start, and flags change it")
    for field in config.leaf_fields(Settings()):
        _add_flag(train, field)
    train.add_argument("--peft_config", type=_peft_config, help="r, lora_alpha, lora_dropout, target_modules as JSON")
    train.add_argument("--preset", choices=tuple(config.PRESETS), help="speed against memory; sets " + ", ".join(
        config.PRESETS["small"]))
    train.add_argument("--start", choices=("auto", "resume", "fresh"), default="auto",
                       help="auto, the default, goes on from an unfinished checkpoint of the same settings")

    check = command("check-data", _check_data, "list what is wrong with a data file; the exit code says if anything is")
    convert = command("convert", _convert, "write a jsonl as the .bin and .idx that training reads from the disk")
    texts = ("data_type", "tokenizer", "template", "sft_field")
    for made, known in (check, (*texts, "ctx_len", "loss_mask", "mask_id", "sft_split")), (convert, texts):
        made.add_argument("data_file", help="the file; its suffix may be left out")
        for field in config.leaf_fields(DataSettings()):
            if field.name in known:
                _add_flag(made, field)
        made.add_argument("--load_model", help="the base, whose vocabulary makes the tokens (default: World's)")
    check.add_argument("--mend", metavar="NEW_FILE", help="of a jsonl: write what is good, and what can be mended in "
                       "one sure way, to this file, and check that")
    convert.add_argument("prefix", help="PREFIX.bin and PREFIX.idx are written; interrupted, it goes on from there")

    imported = command("import", _import, "turn RWKV-PEFT's run_lora.sh into a run's settings")
    imported.add_argument("script", help="the shell script; it is read, not run")
    imported.add_argument("--proj_dir", help="the run's folder, by default the script's own proj_dir")

    settings = command("settings", _settings, "every setting with its default, as a table")
    settings.add_argument("--zh", action="store_const", const="zh", default="en", dest="language", help="中文")

    merge = command("merge", _merge, "put an adapter into its base: a whole model")
    merge.add_argument("--load_model", required=True, help="the base model, a .pth or Ai00's .st")
    merge.add_argument("--adapter", required=True, nargs="+", help="adapter-*.safetensors, a run's folder for its last "
                       "one, RWKV-PEFT's .pth, or a folder of the peft library; several are added up")
    merge.add_argument("--output", required=True, help="the merged .pth to write")
    merge.add_argument("--strength", type=float, nargs="+", default=[1.0], help="share of the adapter, 0 to 1.5, or "
                       "one for each (default: 1); -1 takes it out of a merged model")
    merge.add_argument("--dtype", choices=("base", "fp16", "bf16", "fp32"), default="base",
                       help="of the written file (default: base)")
    merge.add_argument("--other_base", action="store_true",
                       help="merge into another base of the same shape than the adapter was trained on")

    export = command("export", _export, "write a model or an adapter in another program's format")
    export.add_argument("--to", required=True, choices=("runner", "ai00", "peft"),
                        help="RWKV Runner's .pth, Ai00's .st (of a model, or of a LoRA alone), a folder for peft")
    export.add_argument("--input", required=True, help="a complete model, or an adapter or a run's folder for its last")
    export.add_argument("--output", required=True, help="the file to write; for peft a folder")
    for made in (merge, export):
        made.add_argument("--lora_alpha", type=float, help="for older RWKV-PEFT's .pth, which does not say it")

    get = command("get", _get, "fetch a published base model by name, such as rwkv7-g1-0.1b")
    get.add_argument("name", help="as on the hub, with or without the date")
    get.add_argument("--folder", default="models", help="where it is put (default: models)")
    get.add_argument("--endpoint", help="the hub or a mirror of it; by default HF_ENDPOINT, else huggingface.co")

    run = command("run", _run, "run all notebooks in order on the quickstart")
    run.add_argument("--notebooks", default="notebooks", help="their folder (default: notebooks)")
    return parser


def _add_flag(parser, field) -> None:
    text, default = field.metadata, field.default
    unit = f" [{text['unit']}]" if text["unit"] else ""
    kind = {"nargs": "+"} if isinstance(default, tuple) else {"type": type(default)}
    choices = ",".join(map(str, text["choices"]))    # which are config's to check
    parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS,
                        metavar=f"{{{choices}}}" if choices else field.name.upper(),
                        help=f"{text['en']}{unit} (default: {default})".replace("%", "%%"), **kind)


def _peft_config(text: str) -> dict:
    try:
        values = dict(json.loads(text))
    except (ValueError, TypeError):
        raise argparse.ArgumentTypeError(f"not JSON: {text!r}; quote it: '{{\"r\":32,\"lora_alpha\":64}}'") from None
    known = [*config.values(LoraSettings()), "lora_dropout"]
    for name in set(values) - set(known):
        raise argparse.ArgumentTypeError(f"{did_you_mean(name, known)} known keys: {', '.join(known)}".lstrip())
    return values


def settings_from(arguments: argparse.Namespace) -> tuple[Run, Settings]:
    """The run and its settings from train's parsed arguments: preset, flags, peft_config, of which the later counts.

    Raises SettingsError where proj_dir is missing, or flags and peft_config say different.
    """
    known, lora = config.values(Settings()), arguments.peft_config or {}
    flags = {name: value for name, value in vars(arguments).items() if name in known}
    for name in lora:
        if flags.get(name, lora[name]) != lora[name]:
            raise SettingsError(f"{name} is {flags[name]} and, in peft_config, {lora[name]}", where=name,
                                fix="give it once")
    if not flags.get("proj_dir"):
        raise SettingsError("proj_dir is not given", where="--proj_dir", fix="name a folder for the run's files")
    run = Run(flags["proj_dir"])
    start = Settings() if {"load_model", "data_file"} <= set(flags) else run.settings()
    return run, config.replace(start, **config.PRESETS.get(arguments.preset, {}) | flags | lora)


def _settings(arguments) -> None:
    print("| | default | |\n|---|---|---|")
    for field in config.leaf_fields(Settings()):
        text = field.metadata
        default = " ".join(field.default) if isinstance(field.default, tuple) else field.default
        chosen = f" ({' · '.join(map(str, text['choices']))})" if text["choices"] else ""
        print(f"| `{field.name}` | {default} {text['unit']} | {text[arguments.language]}{chosen} |")


def _import(arguments) -> None:
    asked = parser().parse_args(["train", *compat.read_script(arguments.script)])
    if arguments.proj_dir:
        asked.proj_dir = arguments.proj_dir
    run, settings = settings_from(asked)
    config.check_together(settings)
    run.save_settings(settings)
    folder = os.path.abspath(run.folder)    # a notebook's own folder is another
    print(f"wrote {run.settings_file}\nopen it in notebook 03_train_lora with RUN = {folder!r} and SETTINGS = {{}}, or "
          f"run:\nrwkv-nb train --proj_dir {shlex.quote(folder)}")


def _data(arguments) -> tuple:
    """The settings of the data, and the tokenizer: the base's, else World's."""
    from .model import load_weights, read_shape
    from .tokenizer import get_tokenizer

    data = config.replace(DataSettings(), **{k: v for k, v in vars(arguments).items() if hasattr(DataSettings, k)})
    if arguments.load_model:
        return data, get_tokenizer(data.tokenizer, read_shape(load_weights(arguments.load_model)).vocab_size)
    return data, get_tokenizer("world" if data.tokenizer == "auto" else data.tokenizer)


def _check_data(arguments) -> int:
    from .data.check import check_data, mend_jsonl

    data, tokenizer = _data(arguments)
    left_out = []
    if arguments.mend:
        mended = mend_jsonl(data.data_file, arguments.mend, data)
        print(mended)
        data, left_out = config.replace(data, data_file=arguments.mend), mended.left_out
    report = check_data(data, tokenizer)
    print(report)
    return 1 if report.problems or left_out else 0


def _convert(arguments) -> None:
    from .data.binidx import pair
    from .data.convert import jsonl_to_binidx

    data, tokenizer = _data(arguments)
    count = jsonl_to_binidx(data.data_file, arguments.prefix, tokenizer,
                            lambda now: _line(str(now), last=now.done == now.total), data=data)
    print(f"{pair(arguments.prefix)[0]} and .idx: {count:,} documents of {tokenizer.name} tokens")


def _train(arguments) -> None:
    from .train.launch import session_for

    run, settings = settings_from(arguments)
    session = session_for(run, settings, start=arguments.start, ask=False).start()
    before = signal.signal(signal.SIGTERM, lambda *_: session.stop())  # how a cluster says that time is up
    end = session.join(_Told())
    signal.signal(signal.SIGTERM, before)
    _line("")
    print(f"{_progress(end)}\nthe run is in {run.folder}")


class _Told:
    """Tells what a run has to say on stderr: each notice once, and where it stands; in a file that every 10 seconds."""

    def __init__(self):
        self._notices, self._at = 0, 0.0

    def __call__(self, now) -> None:
        for notice in now.notices[self._notices:]:
            print(notice, file=sys.stderr)
        self._notices = len(now.notices)
        _line(_progress(now))
        if now.rows and not sys.stderr.isatty() and time.monotonic() - self._at > 10:
            self._at = time.monotonic()
            print(_progress(now), file=sys.stderr, flush=True)


def _progress(now) -> str:
    last = next((row for row in reversed(now.rows) if "loss" in row), None)
    if not last:
        return now.shown
    left = "" if now.done or now.seconds_left is None else f" · {duration_text(now.seconds_left)} left"
    return (f"{now.shown} · step {now.step}/{now.total_steps} · loss {last['loss']:.4f} · lr {last['lr']:.2e} · "
            f"{last['tokens_per_s']:.0f} tokens/s{left}")


def _merge(arguments) -> int:
    from .lora.merge import merge
    from .model import DTYPES

    strength = arguments.strength if len(arguments.strength) > 1 else arguments.strength[0]
    proof = merge(arguments.load_model, arguments.adapter, arguments.output, strength=strength,
                  dtype=DTYPES.get(arguments.dtype), lora_alpha=arguments.lora_alpha,
                  allow_other_base=arguments.other_base, progress=_bar)
    print(proof)
    return 0 if proof.ok or proof.rounded else 1


def _export(arguments) -> None:
    from .export import EXPORTS

    alpha = {} if arguments.to == "runner" else {"lora_alpha": arguments.lora_alpha}    # Runner's is a model as it is
    print(EXPORTS[arguments.to](arguments.input, arguments.output, progress=_bar, **alpha))


def _get(arguments) -> None:
    from .hub import get

    get(arguments.name, arguments.folder, endpoint=arguments.endpoint)


def _bar(done: int, total: int) -> None:
    _line(f"{done / total:4.0%} {'█' * round(40 * done / total):40}", last=done == total)


def _line(text: str, *, last: bool = False) -> None:
    """On a terminal, a line that the next one takes the place of, unless it is the last."""
    if sys.stderr.isatty():
        print(f"\x1b[K{text}", end="\n" if last else "\r", file=sys.stderr, flush=True)


def _run(arguments) -> int:
    from .notebook_runner import run_notebooks

    return run_notebooks(arguments.notebooks)


if __name__ == "__main__":
    sys.exit(main())
