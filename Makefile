# Every target sets itself up: a virtual environment in .venv, made once, remade when pyproject.toml changes.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
DEMO ?= workspace/demo
SMOKE := build/smoke
NOTEBOOKS := $(wildcard notebooks/src/*.py)

.DEFAULT_GOAL := help
.PHONY: help setup demo pretrain pictures test test-all notebooks lint bench badges clean

help:  ## show what each target does
	@grep -hE '^[a-z-]+:.*## ' Makefile | sort | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(READY)  ## make the virtual environment .venv with everything in it

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Python 3.11, 3.12 or 3.13 is needed; $(PYTHON) is $$($(PYTHON) -V). Try: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[app,cluster,completion,data,dev]'
	@touch $(READY)

demo: $(READY)  ## the whole way on the embedded known-answer cohort, in minutes, into workspace/demo
	$(BIN)/brainage-nb run --workspace $(DEMO) -p source=demo -p n_subjects=210 -p demo_voxel_mm=2 \
	  -p recipe=reference -p spacing_mm=4 -p size=48 -p epochs=15 -p widths=32,64,128,256 \
	  -p vgg_weights=random_projection -p image_size=64 -p per_band=4

pretrain: $(READY)  ## a bundle to start from (init_from), trained on 600 artificial heads, into workspace/pretrain
	$(BIN)/brainage-nb run --workspace workspace/pretrain --to 04 -p source=demo -p n_subjects=600 -p demo_voxel_mm=2 \
	  -p recipe=best -p spacing_mm=4 -p size=48 -p epochs=30

test: $(READY) lint  ## lint, layers, twins, unit tests, and every notebook executed with smoke values
	$(BIN)/pytest -n auto --dist loadfile -m "not slow"
	rm -rf $(SMOKE)
	$(BIN)/pytest --nbmake --nbmake-timeout=900 notebooks

test-all: test  ## the same and the slow proofs
	$(BIN)/pytest -m slow

lint: $(READY)  ## ruff, import layers, and notebooks that agree with their sources
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python notebooks/twins.py --check

notebooks: $(READY)  ## regenerate notebooks/*.ipynb from notebooks/src/*.py
	$(BIN)/python notebooks/twins.py

pictures: demo  ## remake the README's pictures from the demo
	$(BIN)/python docs/make_pictures.py $(DEMO)

.PHONY: docs
DOCS_READY := .venv/.docs-ready

docs: $(DOCS_READY) $(DEMO)/results/07_predict_and_explain.json  ## the site, from the executed demo, into build/site/html
	$(BIN)/python docs/build_site.py $(DEMO) build/site

$(DOCS_READY): pyproject.toml | $(READY)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[docs]'
	@touch $(DOCS_READY)

$(DEMO)/results/07_predict_and_explain.json:
	$(MAKE) demo

bench: $(READY)  ## run every benchmark; tables on screen, JSON under benchmarks/out (QUICK=1 for short forms)
	$(BIN)/python benchmarks/run_all.py $(if $(QUICK),--quick)

badges: $(READY)  ## write repository and version into badges, set-up cells and README: make badges [REPO=owner/name]
	$(BIN)/python notebooks/twins.py --repository $(REPO)

clean:  ## remove what was generated, keep .venv and workspaces
	rm -rf build .pytest_cache .ruff_cache benchmarks/out
