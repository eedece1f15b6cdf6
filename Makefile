# `make demo` and `make test` set everything up on a fresh machine; PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TAG := $(shell $(PYTHON) -c "import sys; print('py%d%d' % sys.version_info[:2])")
STAMP := $(VENV)/.installed-$(TAG)

.PHONY: demo test test-cluster test-dcmtk test-faults test-fuzz test-integration test-intervals test-serve test-viewer viewer check format constraints wheel sbom audit bench \
	bench-score bench-serve clean

demo: $(STAMP)
	$(BIN)/medvision demo --folder demo

# Tests that start a Ray of their own take both cores; the others share them out by file.
test: $(STAMP)
	$(BIN)/pytest -m "not slow and not integration" -n 2 --dist loadfile --durations=15
	$(BIN)/pytest tests/integration -m core --durations=15

# The other tests on a Ray: training, folds, tuning, poison, a killed driver, the server. CI runs them too.
test-integration: $(STAMP)
	$(BIN)/pytest tests/deploy tests/integration tests/scoring -m "integration and not core and not slow" --durations=15

# What every comparable corpus file looks like, beside dcmtk (Debian package dcmtk; skipped without it).
test-dcmtk: $(STAMP)
	$(BIN)/pytest tests/imaging/test_dcmtk.py -m "" -rPs

# Whole runs while processes are killed and the object store misbehaves. On two cores `-n 2` makes the kills no faster.
KILLS := $(VENV)/kills.jsonl
test-faults: $(STAMP)
	rm -f $(KILLS)
	MEDVISION_KILL_RESULTS=$(KILLS) $(BIN)/pytest tests/faults/kills -m ""
	$(BIN)/python tests/faults/kills/summary.py $(KILLS) --record benchmarks/results/kills.json
	$(BIN)/pytest tests/faults/test_s3_faults.py -m "" --durations=15
	$(BIN)/pytest tests/integration -m slow --durations=15

# Three Ray nodes on this machine: nodes killed, added and cut off, and the head lost, while scoring and training.
test-cluster: $(STAMP)
	MEDVISION_CLUSTER_RESULTS=benchmarks/results/cluster.json $(BIN)/pytest tests/cluster -m "" --durations=8

# 20,000 damaged files through the real row function; goes on where it was stopped. ARGS are the script's options.
test-fuzz: $(STAMP)
	$(BIN)/python tests/fuzz/campaign.py --summary benchmarks/results/fuzz.json $(ARGS)

# How often 95 % intervals hold the truth, over 1,500 simulated studies; a short version is in `make test`.
test-intervals: $(STAMP)
	$(BIN)/pytest tests/evaluation/test_coverage.py -m slow -rPs

# Requests made from the server's OpenAPI document, 2,000 damaged files, answers beside the batch job's rows over real data.
test-serve: $(STAMP)
	$(BIN)/pytest tests/serving -m slow -rPs

# The viewer page in headless Chromium (Debian package chromium; skipped without it).
test-viewer: $(STAMP)
	$(BIN)/pytest tests/serving/test_page.py -m "" --durations=5

# Check, test and build the viewer page into the package; needs Node 20.19 or newer.
viewer:
	cd viewer && npm install --no-package-lock && npm run check && npm test && npm run build

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The benchmarks of scoring, tables, decoding, start-up and a training's speed, and one table; about an hour on two quiet cores. ARGS are the script's options.
bench: $(STAMP)
	$(BIN)/python benchmarks/all.py $(ARGS)

# Scoring speed beside a plain torch DataLoader loop; ARGS are the script's options.
bench-score: $(STAMP)
	$(BIN)/python benchmarks/score_vs_dataloader.py $(ARGS)

# The server beside the bare predictor, overloaded, and with its replica killed; ARGS are the script's options.
bench-serve: $(STAMP)
	$(BIN)/python benchmarks/serve.py $(ARGS)

# Write down the versions that are installed now, for this Python.
constraints: $(STAMP)
	( echo "# Versions that CI installs with this Python; made by \`make constraints\`."; \
	  $(BIN)/pip freeze --exclude-editable | sed 's/ @ .*//' | sort ) > constraints/$(TAG).txt

# One file that installs everything; cluster.yaml and `medvision submit --code` carry it.
wheel: $(STAMP)
	rm -rf build dist
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

# What is in this environment, as CycloneDX, and what is known against it (needs a registry; pip-audit also its database).
TOOLS := .venv-tools
$(TOOLS)/bin/%:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet "cyclonedx-bom>=7,<8" "pip-audit>=2.9,<3"

sbom: $(STAMP) $(TOOLS)/bin/cyclonedx-py
	$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file sbom.json $(BIN)/python

audit: $(TOOLS)/bin/pip-audit
	$(TOOLS)/bin/pip-audit --disable-pip --no-deps --requirement constraints/$(TAG).txt

$(STAMP): pyproject.toml constraints/$(TAG).txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints/$(TAG).txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(TOOLS) sbom.json demo build dist *.egg-info
