PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo-run

.PHONY: demo test test-slow check docs places screenshot bench evidence cluster-evidence clean

demo: $(VENV)/.run  ## set up, precompute synthetic scenes fetched over loopback HTTP, train a cascade for minutes, sample
	$(BIN)/pipeline run precompute -c demo --out $(DEMO)
	$(BIN)/pipeline verify $(DEMO)/store
	$(BIN)/pipeline report $(DEMO)
	$(BIN)/pipeline run train -c demo-base --out $(DEMO)/base
	$(BIN)/pipeline run train -c demo-sr --out $(DEMO)/sr
	$(BIN)/pipeline run sample -c demo --out $(DEMO)/images
	@echo "How often images of captions that training never saw have the right colour, shape and position:"
	$(BIN)/python -m benchmarks.cascade --work $(DEMO) --trained

# Small tensors are slow in many threads; and test processes need the compiled modules, or each compiles them again.
TESTING := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=
test: $(VENV)/.dev  ## set up, then run the tests
	$(TESTING) $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.dev  ## the tests that take minutes: kills, real images, thousands of shards
	$(TESTING) $(BIN)/python -m pytest -m slow --timeout 1200 -n 2 --dist load

check: $(VENV)/.dev  ## style, types, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

docs: $(VENV)/.docs  ## build the documents as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

places: $(VENV)/.dev  ## the packages of SkyPilot, dstack and Kubeflow read our files for them; needs a package index
	$(BIN)/python -m benchmarks.places --work evidence-run/places

screenshot: $(VENV)/.dev  ## the demo's samples in `pipeline browse`, for README; needs chromium
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.stages.browse.screenshot docs/browse.png

bench: $(VENV)/.dev  ## measure, and rewrite the table in benchmarks/README.md
	$(BIN)/python -m benchmarks.resize --out benchmarks/results/resize.json
	$(BIN)/python -m benchmarks.codec --out benchmarks/results/codec.json
	$(BIN)/python -m benchmarks.store --out benchmarks/results/store.json
	$(BIN)/python -m benchmarks.encode --out benchmarks/results/encode.json
	$(BIN)/python -m benchmarks.encode_llm --out benchmarks/results/encode_llm.json
	$(BIN)/python -m benchmarks.store_size --out benchmarks/results/store_size.json
	$(BIN)/python -m benchmarks.padding --out benchmarks/results/padding.json
	$(BIN)/python -m benchmarks.engine --out benchmarks/results/engine.json
	$(BIN)/python -m benchmarks.overhead --out benchmarks/results/overhead.json
	$(BIN)/python -m benchmarks.loader_wait --out benchmarks/results/loader_wait.json
	$(BIN)/python -m benchmarks.online --out benchmarks/results/online.json
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.teacher --out benchmarks/results/teacher.json
	$(BIN)/python -m benchmarks.download --out benchmarks/results/download.json
	$(BIN)/python -m benchmarks.plan --out benchmarks/results/plan.json
	$(BIN)/python -m benchmarks.simulate --out benchmarks/results/simulate.json
	$(BIN)/python -m benchmarks.parts --out benchmarks/results/parts.json
	$(BIN)/python -m benchmarks.export --out benchmarks/results/export.json
	$(BIN)/python -m benchmarks.table

evidence: $(VENV)/.dev  ## what takes longer than CI may: train the demo's cascade to the end and score it, learn 8 images
	$(BIN)/python -m benchmarks.cascade --work evidence-run/cascade --out benchmarks/results/cascade.json --grid docs/cascade.png
	$(BIN)/python -m benchmarks.recipes --store evidence-run/cascade/store --work evidence-run/recipes --out benchmarks/results/recipes.json
	$(BIN)/python -m benchmarks.cascade --buckets --work evidence-run/cascade-buckets --out benchmarks/results/cascade_buckets.json
	$(BIN)/python -m benchmarks.transcription --work evidence-run/words --out benchmarks/results/transcription.json --grid docs/words.png
	$(BIN)/python -m benchmarks.overfit --work evidence-run/overfit --out benchmarks/results/overfit.json --plot docs/overfit.svg
	$(BIN)/python -m benchmarks.store_dtype --work evidence-run/store-dtype --out benchmarks/results/store_dtype.json
	$(BIN)/python -m benchmarks.dalle2 --work evidence-run/dalle2 --out benchmarks/results/dalle2.json
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.faults --work evidence-run/faults --most 400 --out benchmarks/results/faults.json
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.far --work evidence-run/far --out benchmarks/results/far.json
	$(BIN)/python -m benchmarks.chaos --runs 30 --work evidence-run/chaos --out benchmarks/results/chaos.json
	$(BIN)/python -m benchmarks.browse --work evidence-run/browse --out benchmarks/results/browse.json
	$(BIN)/python -m benchmarks.hostile --work evidence-run/hostile --out benchmarks/results/hostile.json
	$(BIN)/python -m benchmarks.damage --work evidence-run/damage --out benchmarks/results/damage.json
	$(BIN)/python -m benchmarks.duplicates --work evidence-run/duplicates --out benchmarks/results/duplicates.json
	$(BIN)/python -m benchmarks.buckets --work evidence-run/buckets --out benchmarks/results/buckets.json
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.mixtures --work evidence-run/mixtures --out benchmarks/results/mixtures.json
	$(BIN)/python -m benchmarks.resolve --out benchmarks/results/resolve.json
	$(BIN)/python -m benchmarks.places --work evidence-run/places $(if $(CRDS),--crds $(CRDS)) --out benchmarks/results/places.json
	$(BIN)/python -m benchmarks.input --earlier 1ec2329 --work evidence-run/input --out benchmarks/results/input.json
	$(BIN)/python -m benchmarks.job --earlier 1ec2329 --work evidence-run/job --out benchmarks/results/job.json
	$(BIN)/python -m benchmarks.requests --earlier 1ec2329 --work evidence-run/requests --out benchmarks/results/requests.json
	$(BIN)/python -m benchmarks.sampling --earlier 1ec2329 $(if $(PEERS),--peers-python $(PEERS)) --out benchmarks/results/sampling.json
	$(BIN)/python -m benchmarks.table

cluster-evidence: $(VENV)/.dev  ## what schedulers and clusters do to runs; on a real Slurm too, where it is installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.slurm --out benchmarks/results/slurm.json
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.preemption --work evidence-run/preemption --speedup-images 0 --out benchmarks/results/preemption.json
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.preemption --work evidence-run/preemption --images 0 --out benchmarks/results/preemption_nodes.json
	$(BIN)/python -m benchmarks.table

clean:  ## remove what the targets above made
	rm -rf $(VENV) $(DEMO) site evidence-run .pytest_cache .ruff_cache

$(VENV)/.run: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@
