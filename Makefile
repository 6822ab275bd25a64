# make demo | make test | make check: each does all the set-up that it needs on a fresh Linux machine with Python 3.11+.
.PHONY: demo test test-slow chromium check format clean

VENV  := .venv
RUN   := $(VENV)/bin
PYTHON ?= python3
# Every process of a build imports much: compiled once, not each time.
unexport PYTHONDONTWRITEBYTECODE
EXTRA := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)

demo: $(VENV)/.ready
	$(RUN)/recap demo

test: $(VENV)/.ready chromium
	$(RUN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

# What takes long: real photos without verification, more kills, every hostile input, every kill of a publish, a shard of 2 GB,
# twenty times the examples, other architectures, a real endpoint, nodes of a cluster that die, a Slurm job, a run on S3.
test-slow: $(VENV)/.ready chromium
	RECAP_FULL=1 $(RUN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "slow or full"

# A browser for the tests of the explorer page; where it cannot be installed they skip and say so.
chromium:
	@command -v chromium >/dev/null 2>&1 || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1 || \
		echo "chromium is not here and cannot be installed: apt-get install chromium"

check: $(VENV)/.ready
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/mypy

format: $(VENV)/.ready
	$(RUN)/ruff format .
	$(RUN)/ruff check --fix .

# uv comes from PATH or, where there is none, from a small environment of its own.
$(VENV)/.ready: pyproject.toml
	@command -v uv >/dev/null 2>&1 || test -x .uv/bin/uv || { $(PYTHON) -m venv .uv && .uv/bin/python -m pip install --quiet 'uv>=0.9'; }
	PATH="$$PATH:$(CURDIR)/.uv/bin" uv sync --quiet --extra $(EXTRA) --extra ray --extra s3 --extra train
	@touch $@

clean:
	rm -rf $(VENV) .uv .mypy_cache .ruff_cache .pytest_cache
