"""RWKV-PEFT's script and flags become a run's settings, or an answer that says what to do."""

import pytest

from rwkv_nb.cli import main, parser
from rwkv_nb.compat import read_script
from rwkv_nb.config import replace
from rwkv_nb.errors import SettingsError
from rwkv_nb.runs import Run

APPENDIX = """load_model="{base}"
proj_dir='{run}'
data_file={data}

n_layer=2
n_embd=64

micro_bsz=8
epoch_save=1
epoch_steps=2
ctx_len=128
peft_config='{{"r":8,"lora_alpha":32,"lora_dropout":0.05}}'

python train.py --load_model $load_model \\
--proj_dir $proj_dir --data_file $data_file \\
--vocab_size 257 \\
--data_type jsonl \\
--n_layer $n_layer --n_embd ${{n_embd}} \\
--ctx_len $ctx_len --micro_bsz $micro_bsz \\
--epoch_steps $epoch_steps --epoch_count 4 --epoch_save $epoch_save \\
--lr_init 1e-5 --lr_final 1e-5 \\
--accelerator {accelerator} --precision bf16 \\
--devices 1 --strategy deepspeed_stage_1 --grad_cp 1 \\
--my_testing "x070" \\
--peft lora --peft_config $peft_config
# --op cuda/fla/triton
# --lr_schedule wsd
"""


@pytest.fixture
def script(tmp_path, settings):
    path = tmp_path / "run_lora.sh"
    path.write_text(APPENDIX.format(base=settings.train.load_model, run=tmp_path / "a run", accelerator="cpu",
                                    data=settings.data.data_file.removesuffix(".jsonl")))
    return path


def test_the_appendix_imports_and_trains(tmp_path, script, capsys):
    assert main(["import", str(script)]) == 0, capsys.readouterr().err
    settings = Run(tmp_path / "a run").settings()
    assert settings == replace(settings, my_testing="x070", n_layer=2, n_embd=64, micro_bsz=8, epoch_steps=2,
                               epoch_count=4, ctx_len=128, r=8, lora_alpha=32.0, lora_dropout=0.05, vocab_size=257,
                               data_type="jsonl",
                               lr_init=1e-5, lr_final=1e-5, precision="bf16", strategy="deepspeed_stage_1")
    assert main(["train", *read_script(script)]) == 0
    assert "strategy deepspeed_stage_1 is not needed" in capsys.readouterr().err
    assert len([row for row in Run(tmp_path / "a run").metrics() if "loss" in row]) == 8


def test_the_appendix_s_own_arguments_are_all_known(script):
    arguments = read_script(script)
    arguments[arguments.index("cpu")] = "gpu"
    assert vars(parser().parse_args(["train", *arguments]))["accelerator"] == "gpu"


@pytest.mark.parametrize("text, said", [
    ("python train.py --r $r", "run_lora.sh:1: the variable r is not set"),
    ("a=1\npython train.py --x 'a", "run_lora.sh:2: this line cannot be read"),
    ("python train.py --r $1", "write its value there"),
    ("a=(--r 8)\npython train.py ${a[@]}", "would have to be run"),
    ("echo hello", "does not start train.py"),
    ("python train.py --micro_bzs 2", "did you mean --micro_bsz"),
    ("python train.py --train_type infctx", "set --chunk_ctx"),
    ("""python train.py --peft_config '{"lora_r":8}'""", "known keys"),
    ("""python train.py --r 8 --peft_config '{"r":16}'""", "r is 8 and, in peft_config, 16"),
])
def test_what_cannot_be_read_is_answered_with_the_mend(tmp_path, capsys, text, said):
    (tmp_path / "run_lora.sh").write_text(text)
    assert main(["import", str(tmp_path / "run_lora.sh"), "--proj_dir", str(tmp_path)]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("text, expected", [
    ("export A='a b' # 注释\npython -u ./train.py --x $A --y \"${A}c\" > log 2>&1 &", ["--x", "a b", "--y", "a bc"]),
    ("R=16; B=a;torchrun train.py --c \"{\\\"r\\\":$R}\" --b=$B && echo", ["--c", '{"r":16}', "--b=a"]),
    ("python train.py --x 1 \\\n  # --wandb 项目 \\\n  --y 2 \\\n", ["--x", "1", "--y", "2"]),
    ("m='/我的 m/C#1.pth' # 'its\npython train.py --x $m --y a#b;# c", ["--x", "/我的 m/C#1.pth", "--y", "a#b"]),
    ("a=1\r\npython train.py --x $a \\\r\n --y '路 径'\r\n", ["--x", "1", "--y", "路 径"]),
    ("python train.py --x $FROM_OUTSIDE --y ${NOT_SET:-2}", ["--x", "outside", "--y", "2"]),
    ("echo 'starts train.py'; if [ -f train.py ]; then\npython train.py --x 1\nfi", ["--x", "1"]),
    ("m=~/m.pth\nm+=_\npython train.py --x $m --y ~/run", ["--x", "/home/me/m.pth_", "--y", "/home/me/run"]),
])
def test_the_shell_s_ways_of_writing(tmp_path, monkeypatch, text, expected):
    monkeypatch.setenv("FROM_OUTSIDE", "outside")
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "run_lora.sh").write_bytes(text.encode())
    assert read_script(tmp_path / "run_lora.sh") == expected


def test_the_notebook_finds_the_run_from_its_own_folder(tmp_path, script, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["import", script.name, "--proj_dir", "我的 run"]) == 0
    assert f"RUN = {str(tmp_path / '我的 run')!r}" in capsys.readouterr().out


def test_nothing_in_a_script_is_run(tmp_path):
    path = tmp_path / "run_lora.sh"
    path.write_text(f"touch {tmp_path}/ran\nx=$(touch {tmp_path}/ran)\npython train.py --proj_dir a")
    assert read_script(path) == ["--proj_dir", "a"]
    path.write_text(f"python train.py --proj_dir $(touch {tmp_path}/ran)")
    with pytest.raises(SettingsError, match="would have to be run"):
        read_script(path)
    assert not (tmp_path / "ran").exists()
