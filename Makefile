# Each target does its own set-up: all it needs is make and Python, 3.11 to 3.13.
PYTHON ?= python3
VENV   := .venv
OLDEST := .venv-oldest
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --dist worksteal

.PHONY: bench demo test check format check-oldest lint api quality quality-runs dist docs notebooks clean

demo: $(VENV)/.ready      ## train a big model and small ones with and without its help; a table and a picture
	$(VENV)/bin/fastdistill demo

bench: $(VENV)/.ready-bench ## what a step costs, side by side with other ways to distill; tables and a plot
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/bench.py

test: $(VENV)/.ready-dev  ## the tests
	$(PYTEST)

check: lint test          ## what a change must pass: lint, format, types, tests, the pages' code, the import law, the public names

format: $(VENV)/.ready-dev ## format all Python files
	$(VENV)/bin/ruff format -q

check-oldest: $(OLDEST)/.ready ## the tests on the oldest releases that pyproject.toml allows, in an environment of their own
	$(subst $(VENV),$(OLDEST),$(PYTEST))

lint: $(VENV)/.ready-dev
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check -q
	$(VENV)/bin/mypy

api: $(VENV)/.ready-dev   ## write the public names anew, after a decision to change them
	$(VENV)/bin/python tests/project/test_imports_and_names.py > tests/api.txt

quality: $(VENV)/.ready-dev ## the quality benchmark's tables and pictures, and the README's numbers, from the stored runs
	$(VENV)/bin/python benchmarks/quality/pages.py

quality-runs: $(VENV)/.ready-dev out/packages/.ready ## what each recipe is worth: all runs of benchmarks/quality/PROTOCOL.md that are missing; many hours on one core
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/quality/run.py

dist: $(VENV)/.ready-dev  ## build the wheel and the sdist, check them, and try the wheel in a new environment
	$(VENV)/bin/python scripts/check_dist.py

docs: $(VENV)/.ready-docs ## build the site into out/site/html, without network; a dead link or an unknown name is an error
	$(VENV)/bin/python scripts/build_site.py

notebooks: $(VENV)/.ready-notebooks ## each example as a notebook with its outputs, in out/notebooks; a minute or two each
	OMP_NUM_THREADS=1 $(VENV)/bin/python scripts/notebooks.py

clean:
	rm -rf $(VENV) $(OLDEST) dist out

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -e .
	touch $@

$(VENV)/.ready-dev: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -e '.[dev]'
	touch $@ $(VENV)/.ready

# packages whose data the quality benchmark reads; none of their code runs
out/packages/.ready: | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --no-deps --target out/packages elpv-dataset==1.0.0.post1 aeon==1.6.0 river==0.26.1 orange3==3.40.0
	touch $@

$(VENV)/.ready-bench: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -e '.[bench]'
	touch $@ $(VENV)/.ready

$(VENV)/.ready-docs: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -e '.[docs]'
	touch $@ $(VENV)/.ready

$(VENV)/.ready-notebooks: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -e '.[dev,notebooks]'
	touch $@ $(VENV)/.ready $(VENV)/.ready-dev

$(OLDEST)/.ready: pyproject.toml tests/oldest.txt
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install -c tests/oldest.txt -e '.[dev]'
	touch $@
