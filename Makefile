# mmsr: `make demo` runs the main job, `make test` the tests; both set themselves up in .venv.
PYTHON ?= python3
CORES  ?= 2
BIN    := .venv/bin

.PHONY: help setup hooks demo quick test coverage nightly viewers lint lines check bench evidence docs clean lab

help:            ## list the targets
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: .venv/.ready ## create .venv with everything that the targets need

# --prefer-binary: no compiler is asked for. The pinned torch takes a CPU build where pip is configured to find one.
.venv/.ready: settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mmsr needs Python 3.11 or later; say which with: make PYTHON=/path/to/python3"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --prefer-binary -c constraints.txt -e '.[dev]'
	@touch $@

hooks: setup     ## for those who change the project: notebooks merge cell by cell, a check before each commit
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev_install_hooks
	git config merge.nbdev-merge.driver '"$(CURDIR)/$(BIN)/nbdev_merge" %O %A %B %P'
	printf '#!/bin/sh\nexec "%s/nbdev_trust"\n' "$(CURDIR)/$(BIN)" > "$$(git rev-parse --git-path hooks)/post-merge"
	$(BIN)/pre-commit install

demo: setup      ## phantom -> training with and without the MMSR loss -> report (about 5 minutes on 2 cores)
	$(BIN)/mmsr demo --cores $(CORES)

quick: lint      ## style, types, structure, links, cheap pages and tests: under a minute
	$(BIN)/python -m pytest -q -n $(CORES) -m "not slow"

test: setup      ## every notebook and test
	$(BIN)/python -m pytest -n $(CORES) $(PYTEST)

coverage: PYTEST = --cov --cov-report=term --cov-fail-under=90
coverage: test   ## the same, and which lines of the package they run: a quarter slower

nightly: setup   ## hours: tests in full, slow cells, every page as in Jupyter, many kills, 1,000 broken scans, the largest files, the benchmarks
	-$(MAKE) viewers
	MMSR_SLOW=1 MMSR_LARGE=1 MMSR_KILLS=20 MMSR_FUZZ=1000 $(BIN)/python -m pytest -n $(CORES) --timeout 3600
	$(MAKE) bench

viewers: .viewers/.ready ## install other readers of what is written, for tests/scans/test_viewers.py alone

.viewers/.ready: Makefile
	-npm install --silent --no-audit --no-fund --prefix .viewers @niivue/niivue@0.69.0 nifti-reader-js@0.8.0
	test -x .viewers/bin/python || $(PYTHON) -m venv .viewers
	.viewers/bin/python -m pip install --quiet --prefer-binary \
	  ome-zarr==0.18.0 ome-zarr-models==1.7 napari-ome-zarr==0.10.0 ngff-zarr==0.50.0
	@touch $@

lint: setup      ## style and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

lines: setup     ## how long each module is
	@$(BIN)/python tests/count_lines.py

check: setup     ## is the package in step with the notebooks, and are the notebooks clean?
	$(BIN)/nbdev_export && $(BIN)/nbdev_clean && $(BIN)/python tests/clean_views.py && git diff --exit-code --stat -- mmsr nbs

bench: setup     ## measure training, inference, writing and masks against peers, about 16 minutes on a quiet machine
	$(BIN)/python -m pip install --quiet --prefer-binary -c constraints.txt -e '.[dev,bench]'
	mkdir -p runs
	for page in training_step inference preprocessing; do \
	  $(BIN)/python -m papermill -k python3 --cwd nbs/benchmarks nbs/benchmarks/$$page.ipynb runs/$$page.ipynb || exit 1; done

evidence: setup  ## numbers and pictures of the page "Does it work?" from the runs kept in nbs/results/evidence, about half an hour
	for plan in kept_evidence downsampled; do \
	  MMSR_EVIDENCE="$(CURDIR)/nbs/results/evidence" $(BIN)/mmsr plan workflow/plans/$$plan.yaml --out runs/$$plan --cores $(CORES) && \
	  $(BIN)/python workflow/keep_outputs.py runs/$$plan || exit 1; done
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace nbs/evidence.ipynb && $(BIN)/nbdev_clean --fname nbs/evidence.ipynb

docs: setup _site/.ready ## the site, in _site/html/index.html: two minutes
	$(BIN)/python -m pip install --quiet --prefer-binary -c constraints.txt -e '.[dev,docs]'
	$(BIN)/python docs/build.py

_site/.ready: Makefile
	-npm install --silent --no-audit --no-fund --prefix _site @niivue/niivue@0.69.0
	@mkdir -p _site && touch $@

lab: setup       ## open the quickstart in JupyterLab
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/nbs/quickstart.ipynb

clean:           ## remove what builds and the demo left; keeps .venv and other runs
	rm -rf _site runs/demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage .snakemake
