#!/usr/bin/env bash
# Makes an environment ready, once:  .ci/setup.sh FOLDER [test]
# FOLDER is the active conda or virtual environment, or .venv, which is made here. "test" adds what `make test` needs.
set -euo pipefail
cd "$(dirname "$0")/.."
env=$1 extra=${2:-}
python="$env/bin/python"

say()  { if [ -t 1 ]; then printf '\033[1m%s\033[0m\n' "$*"; else printf '%s\n' "$*"; fi; }
stop() { printf '%s\n' "$@" >&2; exit 1; }
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

make_venv() {
    local candidate found=""
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if new_enough "$candidate"; then found=$candidate; break; fi
    done
    [ -n "$found" ] || stop "Python 3.11 or newer is needed; python3 here is: $(python3 --version 2>&1 || true)" \
        "→ install a newer Python, or activate a conda environment that has one, and run make again"
    "$found" -c 'import ensurepip, venv' 2>/dev/null || stop "this Python has no venv module" \
        "→ Debian, Ubuntu, WSL: sudo apt install python3-venv   (elsewhere: activate a conda environment)"
    say "making .venv with $("$found" --version)"
    "$found" -m venv --clear "$env"
}

# A new checkout folder, other dependencies or another setup: the stamp differs and everything below runs again.
stamp="$PWD $(cat pyproject.toml constraints.txt .ci/setup.sh | sha256sum)"
is_done() { [ "$(cat "$env/.rwkv_nb-$1" 2>/dev/null)" = "$stamp" ] && [ -x "$python" ]; }
if is_done test || { [ -z "$extra" ] && is_done run; }; then exit 0; fi

if [ "$env" = "$PWD/.venv" ] && ! "$python" -m pip --version >/dev/null 2>&1; then make_venv; fi
[ -x "$python" ] || stop "the active environment $env has no Python" "→ deactivate it, or install Python in it, and run make again"
new_enough "$python" || stop "Python 3.11 or newer is needed; the active environment $env has $("$python" --version)" \
    "→ deactivate it (make then builds .venv), or activate one with a newer Python"
"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null 2>&1 || stop "the environment $env has no pip" "→ install pip in it"
command -v "${CXX:-c++}" >/dev/null ||
    say "warning: no C++ compiler here, so the slower chunked PyTorch form is used (Debian, Ubuntu, WSL: sudo apt install g++)"

install() {   # a download that is cut goes on from what is whole already
    local try
    for try in 1 2 3; do
        if "$python" -m pip --disable-pip-version-check install "$@"; then return; fi
        say "that did not work (try $try of 3)"
    done
    stop "the packages could not be installed; pip says why above" "→ check the connection and the free disk space, then run make again"
}

# torch goes first and alone: it is most of the download. One that is there and fits is never touched.
if torch=$("$python" -c 'import sys; from importlib.metadata import version; torch = version("torch"); print(torch)
sys.exit(tuple(map(int, torch.split(".")[:2])) < (2, 10))' 2>/dev/null); then
    say "torch $torch is here and is kept"
else
    say "installing torch, the largest download${torch:+ ($torch is here; 2.10 or newer is needed)}"
    install -c constraints.txt --upgrade torch
fi
say "installing JupyterLab and the other packages into $env"
kept=torch
if "$python" -m pip show -q triton >/dev/null 2>&1; then kept='torch\|triton'; fi   # a torch for CUDA brings its own
grep -v "^\($kept\)==" constraints.txt > "$env/.rwkv_nb-constraints.txt"
install -q -c "$env/.rwkv_nb-constraints.txt" -e ".${extra:+[$extra]}"
printf '%s' "$stamp" > "$env/.rwkv_nb-${extra:-run}"
say "ready"
