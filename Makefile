# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Both first install what is missing (see .ci/setup).

CARGO ?= cargo
# The feature `mpi` is built where its headers are; everything else needs no such thing.
FEATURES ?= $(shell command -v mpicc >/dev/null 2>&1 && echo mpi)
FLAGS = --locked $(if $(FEATURES),--features $(FEATURES))
DEMO_DIR ?= runs/demo
TARGET = $(or $(CARGO_TARGET_DIR),target)

.PHONY: help demo test cluster chaos check bench build setup clean

help:
	@echo 'make demo    the whole pipeline on a miniature world, on this CPU (result in $(DEMO_DIR))'
	@echo 'make test    all tests'
	@echo 'make cluster batch scripts on a SLURM of two nodes, started and stopped by the tests (minutes)'
	@echo 'make chaos   ranks killed at random, and the same bytes in the end (CHAOS_SEED, CHAOS_COUNT)'
	@echo 'make check   format, lints as errors, documentation without warnings'
	@echo 'make bench   times of operations and steps on this machine'
	@echo 'make build   the program: $(TARGET)/release/gradtx'

setup:
	@.ci/setup

build: setup
	$(CARGO) build --release $(FLAGS) -p gradtx-launcher

demo: build
	$(TARGET)/release/gradtx demo $(DEMO_DIR)

test: setup
	$(CARGO) test --workspace $(FLAGS)

cluster:
	@.ci/setup cluster
	$(CARGO) test --workspace --locked --features mpi --test cluster

chaos: setup
	CHAOS_SEED=$(or $(CHAOS_SEED),1) CHAOS_COUNT=$(or $(CHAOS_COUNT),25) \
		$(CARGO) test --workspace --locked --features mpi --test chaos

check: setup
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets $(FLAGS) -- -D warnings
	$(CARGO) clippy --workspace --all-targets --locked --no-default-features -- -D warnings
	@command -v shellcheck >/dev/null || echo 'no shellcheck here: scripts are not checked'
	@! command -v shellcheck >/dev/null || shellcheck --external-sources --source-path=SCRIPTDIR slurm/*.sh slurm/*.sbatch tests/cluster/box/*.sh .ci/run .ci/setup
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --workspace --no-deps --locked --quiet

bench: setup
	$(CARGO) bench --locked -p gradtx-benches

clean:
	$(CARGO) clean
