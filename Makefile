# Needs Python 3.11 or newer and make, nothing else: every target sets up .venv itself.

PYTHON ?= python3
VENV ?= .venv
ARGS ?= -n 2 --dist loadfile
BIN := $(VENV)/bin

# jaxlib's eigendecompositions and OpenBLAS each bring their own threads; together they fight over the cores.
export OPENBLAS_NUM_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help demo test docs notebooks lint format wheel findings autoencoder classify tune race text control defaults fidelity crossover pinn regression bench distributed sharded report

# What glibc would return to the system after every step, and get back page by page; see experiments/speed.py.
KEEP := MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000
GIVEN := $(if $(filter command line,$(origin ARGS)),$(ARGS))

#: For users

help: ## this list
	@awk '/^#:/ {print "\n" substr($$0, 4)} /^[a-z]+:.*##/ {sub(/:.*## /, "\t"); print "  " $$0}' $(firstword $(MAKEFILE_LIST)) | expand -t 16

demo: $(VENV)/demo.stamp ## train a CNN and an autoencoder with every method; one table, one picture in results/
	XLA_FLAGS="--xla_backend_optimization_level=1 $(XLA_FLAGS)" $(BIN)/python -m experiments.demo $(GIVEN)

test: $(VENV)/test.stamp ## the suite, with the examples of the docstrings and of the README
	$(BIN)/python -m pytest $(ARGS)

docs: $(VENV)/docs.stamp ## the documentation as a site in site/, without warnings; `make docs ARGS=serve` shows it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(or $(GIVEN),build --strict)

notebooks: $(VENV)/test.stamp ## the .ipynb of every notebook, and a copy that was run, pictures and all, in notebooks/rendered/
	$(BIN)/python notebooks/render.py $(GIVEN)

#: For contributors

lint: $(VENV)/dev.stamp ## style, docstrings against signatures, types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

format: $(VENV)/dev.stamp ## rewrite the files in the house's format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

wheel: $(VENV)/test.stamp ## the package as a wheel in dist/
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

findings: ## what surprised us in JAX and Flax, each shown again in an environment of its own; needs the network
	@for each in findings/*.sh; do echo "$$each"; bash "$$each" || exit 1; done

#: Experiments; ARGS=--help shows the options of each

autoencoder: $(VENV)/test.stamp ## the papers' autoencoders at their authors' settings and tuned; one table, one picture
	$(KEEP) $(BIN)/python -m experiments.autoencoder $(GIVEN)

classify: $(VENV)/test.stamp ## the convnet of TENGraD on Fashion-MNIST, every method at the best of its trials by `make tune`; one table, one picture
	$(KEEP) $(BIN)/python -m experiments.classify $(GIVEN)

tune: $(VENV)/test.stamp ## the same number of trials for every method on a problem, MNIST's autoencoder by default; one table
	$(KEEP) $(BIN)/python -m experiments.tune $(GIVEN)

race: $(VENV)/test.stamp ## an autoencoder by steps of the methods' own choosing, beside tuned Adam; one table, one picture
	$(KEEP) $(BIN)/python -m experiments.race $(GIVEN)

text: $(VENV)/test.stamp ## a small transformer on Shakespeare by methods with as many trials each; one table, one picture
	$(KEEP) $(BIN)/python -m experiments.text $(GIVEN)

pinn: $(VENV)/test.stamp ## differential equations by a net: error after the same seconds, beside Adam and L-BFGS; one table, one picture
	$(BIN)/python -m experiments.pinn $(GIVEN)

regression: $(VENV)/test.stamp ## least squares on whole tables: steps of the methods' own choosing, beside tuned Adam; one table, one picture
	$(BIN)/python -m experiments.regression $(GIVEN)

control: $(VENV)/test.stamp ## which ways of choosing the step survive a small batch; one table, one picture
	$(BIN)/python -m experiments.control $(GIVEN)

defaults: $(VENV)/test.stamp ## every method with a learning rate alone, and with none; two tables
	$(BIN)/python -m experiments.defaults $(GIVEN)

fidelity: $(VENV)/test.stamp ## how far blocks and directions of every method are from those of the exact Fisher matrix; one table, one picture
	$(BIN)/python -m experiments.fidelity $(GIVEN)

crossover: $(VENV)/test.stamp ## time and memory of TENGraD over K-FAC, by width and batch; one table, one picture
	$(KEEP) $(BIN)/python -m experiments.crossover $(GIVEN)

bench: $(VENV)/test.stamp ## step, compile time and memory of every method, over Adam's; one table, one picture
	$(KEEP) $(BIN)/python -m experiments.speed $(GIVEN)

distributed: $(VENV)/test.stamp ## the digits in several processes, one of which is killed; one table
	PYTHONPATH=. $(BIN)/python tests/several_processes.py $(GIVEN)

sharded: $(VENV)/test.stamp ## flops, bytes sent and held of K-FAC on 1 to 8 simulated devices by policy, beside Adam; one table
	PYTHONPATH=. $(BIN)/python tests/sharded.py

report: $(VENV)/test.stamp ## all that was found, on one page with every table and picture: results/report.md
	$(BIN)/python -m experiments.report $(GIVEN)

$(VENV)/demo.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[experiments]'
	touch $@

$(VENV)/test.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

$(VENV)/docs.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

$(VENV)/dev.stamp: $(VENV)/test.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@
