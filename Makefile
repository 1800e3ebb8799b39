# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Both first do `make install-dependencies`, which says what it is about to install.

CARGO ?= cargo
DEMO_DIR ?= runs/demo
TARGET = $(or $(CARGO_TARGET_DIR),target)
# Goals that compile. `.ci/setup` runs first, and a make of its own then reads what it found.
COMPILED = demo test cluster chaos fuzz check bench build gpu dist cubins gpu-check kernels-report test-cuda

.PHONY: help clean install-dependencies setup fresh $(COMPILED)

help:
	@echo 'make demo    the whole pipeline on a miniature world, on this CPU (result in $(DEMO_DIR))'
	@echo 'make test    all tests'
	@echo 'make cluster batch scripts on a SLURM of two nodes, started and stopped by the tests (minutes)'
	@echo 'make chaos   ranks killed at random, and the same bytes in the end (CHAOS_SEED, CHAOS_COUNT)'
	@echo 'make fuzz    mutated files for every parser (FUZZ_SECONDS, FUZZ_SEED)'
	@echo 'make fresh   set-up and a small build in bare Debian and Ubuntu trees, as root (FRESH_FULL=1: and the README)'
	@echo 'make install-dependencies   installs missing packages with apt (root or sudo), NVRTC with pip; all of the'
	@echo '             above do it first; GRADTX_NO_INSTALL=1 only looks'
	@echo 'make check   format, lints as errors, documentation without warnings'
	@echo 'make bench   times of operations and steps on this CPU (on a GPU: benches/gpu.sh)'
	@echo 'make build   the program: $(TARGET)/release/gradtx'
	@echo 'make test-cuda   the tests of CUDA operations and models on a GPU instead of the emulator'
	@echo 'make gpu     the program with the device code of all CUDA kernels in it'
	@echo 'make dist    a tar.gz for users who do not build: program, manual pages, completions, batch scripts'
	@echo 'make gpu-check   a directory to copy to a machine with a GPU, where its run.sh checks and measures everything'
	@echo 'make cubins  that device code alone, in $(TARGET)/cubins'
	@echo 'make kernels-report   registers, shared memory and spills of every CUDA kernel, instructions of some (kernels/REPORT.md)'

install-dependencies:
	@[ "$(GRADTX_NO_INSTALL)" = 1 ] || echo 'setup: installs missing packages with apt, where root or sudo allow it (GRADTX_NO_INSTALL=1 only looks)'
	@.ci/setup $(filter cluster,$(MAKECMDGOALS))

setup: install-dependencies

clean:
	$(CARGO) clean

# Set-up and a small build in bare root directories; all of the README in one of them with FRESH_FULL=1.
fresh:
	tests/fresh/fresh.sh $(FRESH)

ifndef SETUP_DONE

$(COMPILED): install-dependencies
	@$(MAKE) --no-print-directory SETUP_DONE=1 $@

else

# SETUP_FEATURES, and variables that the build needs on this machine.
include $(TARGET)/setup.mk
# `mpi` where MPI and libclang work; `cuda` needs nothing until it is used.
FEATURES ?= $(SETUP_FEATURES)
FLAGS = --locked --features '$(FEATURES)'

# NVIDIA's run-time compiler, which `.ci/setup` puts there where it can; a library named in
# GRADTX_NVRTC goes first. It compiles kernels and checks them; nothing is linked with it.
NVRTC := $(or $(GRADTX_NVRTC),$(wildcard $(abspath $(TARGET))/nvrtc/nvidia/cuda_nvrtc/lib/libnvrtc.so.12))
ifneq ($(NVRTC),)
export GRADTX_NVRTC := $(NVRTC)
endif
# Kernels are tested on the emulator, which needs no GPU, and their compilation where NVRTC is.
TEST_FEATURES = $(FEATURES) $(if $(NVRTC),nvrtc)

build:
	$(CARGO) build --release $(FLAGS) -p gradtx

# The program with the device code of all kernels in it: a node needs a driver, and nothing else.
gpu: cubins
	GRADTX_CUBINS=$(abspath $(TARGET))/cubins $(CARGO) build --release $(FLAGS) -p gradtx

# What is handed to users who do not build (docs/install.md). Without MPI, whose library differs from site to site.
DIST_FEATURES ?= cuda
dist: $(if $(NVRTC),cubins)
	$(if $(NVRTC),GRADTX_CUBINS=$(abspath $(TARGET))/cubins) launcher/packaging/build.sh '$(DIST_FEATURES)' $(TARGET)/dist

# What can run on a GPU: single operations; models and the program.
DEVICE_TESTS = -p gradtx-kernels -p gradtx-tests --features cuda --test cuda_ops --test cuda_emulated

# A directory for a machine that has a driver and nothing else (docs/gpu.md): the program and the two executables of
# device tests, the device code of all three, and a script. Without MPI, which such a machine lacks.
GPU_CHECK = $(TARGET)/gpu-check
GPU_CHECK_PROFILE ?= release
gpu-check: cubins
	$(CARGO) test --profile $(GPU_CHECK_PROFILE) --locked --no-run --message-format=json \
		$(DEVICE_TESTS) >$(TARGET)/gpu-check.json
	executable() { sed -n "s/.*\"executable\":\"\([^\"]*$$1-[^\"]*\)\".*/\1/p" $(TARGET)/gpu-check.json | tail -n 1; }; \
	kernel_tests=$$(executable cuda_ops) && model_tests=$$(executable cuda_emulated) && \
	rm -rf $(TARGET)/gpu-check-parts && \
	GPU_CHECK_PARTS=$(abspath $(TARGET))/gpu-check-parts GRADTX_EMULATOR_CPU=x86-64-v3 \
		$$model_tests --quiet --ignored --exact gpu_check::emulated_parts && \
	benches/gpu-check/assemble.sh $$(dirname "$$model_tests")/../gradtx-under-test $$kernel_tests $$model_tests \
		$(TARGET)/cubins $(TARGET)/gpu-check-parts $(GPU_CHECK)

demo: build
	$(TARGET)/release/gradtx demo $(DEMO_DIR)

test:
	$(if $(NVRTC),,@echo 'NVRTC is not here: kernels are emulated, but not compiled for a device')
	$(CARGO) test --workspace --locked --features '$(TEST_FEATURES)'

# The tests of the emulator, but on this machine's GPU; faults are planted into emulated kernels alone.
test-cuda:
	GRADTX_TEST_ON_DEVICE=1 $(CARGO) test --locked $(DEVICE_TESTS) -- --skip planted:: --skip host:: --skip doctor:: --skip gpu_check::

cubins: REPORT =
kernels-report: REPORT = kernels/REPORT.md
cubins kernels-report:
	$(if $(NVRTC),,$(error $@ needs NVRTC, which .ci/setup could not install: name the library in GRADTX_NVRTC))
	rm -rf $(TARGET)/cubins
	$(CARGO) run --locked --quiet -p gradtx-kernels --features cuda --example cubins -- $(TARGET)/cubins $(REPORT)

# Tests of ranks need MPI.
cluster chaos: $(if $(filter mpi,$(FEATURES)),,without-mpi)
.PHONY: without-mpi
without-mpi:
	$(error this needs MPI and libclang, which .ci/setup did not find: see docs/install.md)

cluster:
	$(CARGO) test --workspace --locked --features '$(TEST_FEATURES)' --test cluster

chaos:
	CHAOS_SEED=$(or $(CHAOS_SEED),1) CHAOS_COUNT=$(or $(CHAOS_COUNT),25) \
		$(CARGO) test --workspace --locked --features '$(TEST_FEATURES)' --test chaos

# Rounds of 10,000 inputs until the time is over; what fails is kept in $(TARGET)/fuzz/failures.
fuzz:
	FUZZ_SECONDS=$(or $(FUZZ_SECONDS),600) FUZZ_SEED=$(or $(FUZZ_SEED),2) \
		$(CARGO) test --locked -p gradtx-tests --test fuzz -- --nocapture ten_thousand_mutated_files

SCRIPTS = slurm/*.sh slurm/*.sbatch launcher/packaging/*.sh tests/cluster/box/*.sh tests/fresh/*.sh tests/interop/*.sh benches/*.sh benches/*/*.sh .ci/run .ci/setup .ci/lib/*.sh
check:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked --features '$(FEATURES) nvrtc' -- -D warnings
	$(CARGO) clippy --workspace --all-targets --locked --no-default-features -- -D warnings
	@command -v shellcheck >/dev/null || echo 'no shellcheck here: scripts are not checked'
	@! command -v shellcheck >/dev/null || shellcheck --external-sources --source-path=SCRIPTDIR $(SCRIPTS)
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --workspace --no-deps $(FLAGS) --quiet

bench: build
	for what in kernels finetune train translate generate comm; do $(TARGET)/release/gradtx bench $$what || exit; done

endif
