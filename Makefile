# Two commands set everything up by themselves: `make demo` and `make test`.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# No GPU, no login, no hub: the demo and the tests run on what PyPI has.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := true

.PHONY: demo test check compiled lint docs docs-check site setup clean

setup: $(READY)

# Torch first and pinned: an unpinned one brings several gigabytes of CUDA. DeepSpeed is built against it.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch setuptools wheel ninja py-cpuinfo
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation deepspeed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[all,dev]'
	touch $(READY)

demo: setup
	$(BIN)/python scripts/fetch_demo_model.py
	rm -rf .cache/demo runs/demo
	$(BIN)/peftchat data from-code --stdlib --max-samples 400 -o .cache/demo
	$(BIN)/peftchat train recipes/demo_cpu.yaml \
		--prompt 'What does `shutil.copy2` do?' \
		--prompt 'How do I call `textwrap.shorten`?' \
		--prompt 'What does `statistics.median` return?'
	$(BIN)/peftchat merge runs/demo
	for question in 'What does `shutil.copy2` do?' 'How do I call `textwrap.shorten`?' \
		'What does `statistics.median` return?'; do \
		echo; echo "> $$question"; $(BIN)/peftchat chat runs/demo/merged --greedy --prompt "$$question"; \
	done

# Checks of style and types, then every test.
test: setup lint compiled
	$(BIN)/python -m pytest

# The tests that neither start several processes nor train the real model.
check: setup lint compiled
	$(BIN)/python -m pytest -m 'not real and not distributed'

# Tests start many processes, and where Python may not write bytecode each would compile the package.
compiled: setup
	$(BIN)/python -m compileall -q peftchat

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/python scripts/make_recipe_docs.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# What is generated from the code: the recipe's schema and reference, the reference of the commands.
docs: setup
	$(BIN)/python scripts/make_recipe_docs.py

# The manual as a site, with search; fails on a link or an anchor that leads nowhere.
site: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

docs-check:
	$(BIN)/python scripts/make_recipe_docs.py --check

clean:
	rm -rf $(VENV) .cache runs build dist *.egg-info
