# The environment: the active virtual or conda environment, else .venv, which the first command makes.
ENV := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX),$(CURDIR)/.venv)
PYTHON := "$(ENV)/bin/python"
export PYTHONUNBUFFERED := 1
# Threads that wait spin for half a millisecond, then sleep: a browser, a kernel and tests share the cores, and
# threads that spin on would take them all; threads that sleep at once cost a training step up to half its speed.
export GOMP_SPINCOUNT := 10000

.PHONY: run lab test bench soak gpu-check setup setup-test

run: setup             ## run all notebooks in order; the results are in runs/quickstart/
	@"$(ENV)/bin/rwkv-nb" run

lab: setup             ## open the notebooks in JupyterLab
	$(PYTHON) -m jupyterlab $(if $(filter 0,$(shell id -u)),--allow-root) --ServerApp.root_dir="$(CURDIR)" \
		--LabApp.default_url=/lab/tree/notebooks/00_check.ipynb

test: setup-test       ## lint, and the tests, among them every notebook against its committed outputs
	$(PYTHON) -m ruff check .
	$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0 --durations=15

bench: setup-test      ## measure on this machine; the results are in tests/benchmarks/results/
	@unset GOMP_SPINCOUNT; for file in tests/benchmarks/bench_*.py; do echo "== $$file"; $(PYTHON) $$file || exit 1; done

soak: setup-test       ## the longer proofs; the results are in tests/benchmarks/results/soak.txt
	@bash -o pipefail -c '$(PYTHON) -m pytest -m soak --timeout=0 --durations=0 | tee tests/benchmarks/results/soak.txt'

# On a machine with a GPU and a torch of its own, where nothing is set up or downloaded.
gpu-check:             ## PART=kernels|memory|train|tune: what only a GPU shows; the results are in tests/benchmarks/results/gpu/
	@"$(or $(wildcard $(ENV)/bin/python),python3)" tests/gpu/gpu_check.py $(or $(PART),kernels) $(if $(PEER),--peer $(PEER)) \
		$(if $(ONLY),--only "$(ONLY)") $(if $(OUT),--out "$(OUT)")

setup:
	@bash .ci/setup.sh "$(ENV)"

setup-test:
	@bash .ci/setup.sh "$(ENV)" test
