# Fibril's one front door. `make help` lists what there is; README.md explains it.
SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
# Any whole CPython from 3.11 on will do, Debian's or another build: bcc is pure Python and linked in by `make install`.
PYTHON ?= $(shell for p in python3 /usr/bin/python3; do \
	$$p -c 'import ensurepip, sqlite3, ssl, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v $$p; break; }; done)
INSTANCE ?= node
PYTEST = $(BIN)/python -m pytest -q

# What the node itself needs, and what its tests and benchmarks need besides.
APT_NODE := etcd-server iproute2 libbpf1 linux-libc-dev nftables python3 python3-bpfcc python3-venv
APT_TEST := busybox-static containerd containernetworking-plugins curl ethtool gcc iperf3 iptables iputils-ping \
	libc6-dev openssl podman runc tcpdump wrk
# What virtual machines with another kernel need.
APT_VM := busybox-static file kmod qemu-system-x86

.PHONY: help
help: ## Show this help
	@awk 'BEGIN {FS = ":.*## "} /^[a-z][a-zA-Z0-9_-]*:.*## / {printf "  \033[1m%-16s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# ---- install -------------------------------------------------------------------------------------------------------
.PHONY: install install-node
install-node: build/.apt-node $(VENV)/.stamp ## Install what a node needs (Debian packages, virtual environment)

install: install-node build/.apt-test ## Install what the node, its tests and its benchmarks need

build/.apt-%: Makefile
	@mkdir -p build
	@scripts/apt-install.sh $(APT_$(shell echo $* | tr a-z A-Z))
	@touch $@

$(VENV)/.stamp: requirements.lock pyproject.toml build/.apt-node
	@echo "creating $(VENV) with $(PYTHON)" >&2
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@ln -sfn /usr/lib/python3/dist-packages/bcc "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/bcc"
	@touch $@

# ---- run -----------------------------------------------------------------------------------------------------------
.PHONY: up down status
up: install-node ## Start a node on this host with an embedded etcd and two sample pods, check them, leave it running
	@$(BIN)/fibril --instance $(INSTANCE) up
	@$(BIN)/fibril --instance $(INSTANCE) pod add sample-a
	@$(BIN)/fibril --instance $(INSTANCE) pod add sample-b
	@$(BIN)/fibril --instance $(INSTANCE) check

down: install-node ## Remove every trace of the node
	@$(BIN)/fibril --instance $(INSTANCE) down

status: install-node ## Show the health of every part of the node
	@$(BIN)/fibril --instance $(INSTANCE) status

# ---- test ----------------------------------------------------------------------------------------------------------
E2E_SERVICES := tests/e2e/lb tests/e2e/policy tests/e2e/sockaccel
.PHONY: test test-unit test-datapath test-e2e test-e2e-nodes test-e2e-services test-interop test-vm soak-identity soak-lb soak-sockaccel lint
test: lint ## Install what is missing and run everything CI runs
	@# Most of what they do is wait: two side by side take little more than half the time. Each is shown when it ends.
	@$(MAKE) --no-print-directory -j2 -O -k test-e2e-nodes test-e2e-services test-vm test-datapath test-interop test-unit

test-unit: install ## Pure Python; no root
	$(PYTEST) tests/unit

test-datapath: install ## BPF programs through BPF_PROG_TEST_RUN
	$(PYTEST) tests/datapath

test-e2e: test-e2e-nodes test-e2e-services ## Real pods and nodes in network namespaces

test-e2e-nodes: install
	$(PYTEST) tests/e2e $(addprefix --ignore=,$(E2E_SERVICES))

test-e2e-services: install
	$(PYTEST) $(E2E_SERVICES)

test-interop: install ## Real etcd, podman, containerd, CNI plugins and Envoy
	$(PYTEST) tests/interop

# Not the kernel this runs on: Debian's newest for this release, emulated.
test-vm: install build/.apt-vm ## What the kernel here may lack (TLS in the kernel), in a virtual machine
	@scripts/vm-kernel.sh build/vm
	$(BIN)/python -m tests.vm.run build/vm/kernel tests/vm

soak-identity: install ## Identities in a storm and under faults for SOAK_S seconds (300), every answer recorded and checked
	FIBRIL_SOAK_S=$(or $(SOAK_S),300) $(PYTEST) -s tests/interop/identity/test_identity_history.py \
		tests/interop/identity/test_identity_sweeper.py -k "history or storm"

soak-lb: install ## Backends that change a thousand times a second under traffic for SOAK_S seconds (300), with processes killed
	FIBRIL_SOAK_S=$(or $(SOAK_S),300) $(PYTEST) -s tests/e2e/lb/test_lb_churn.py

soak-sockaccel: install ## Connections that are handed over, each byte checked while everything changes, for SOAK_S seconds (300)
	FIBRIL_SOAK_S=$(or $(SOAK_S),300) $(PYTEST) -s tests/e2e/sockaccel/test_stress.py

lint: install ## Style, types, contracts, generated code
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/buf lint
	@scripts/check-breaking.sh
	@scripts/check-generated.sh

# ---- contracts and locks -------------------------------------------------------------------------------------------
.PHONY: proto proto-accept lock
proto: install ## Generate the Python package `fibril` and the drop-reason tables
	$(BIN)/python scripts/gen_reasons.py
	scripts/gen-proto.sh

proto-accept: install ## Record the contracts as they are as the ones later changes must not break
	$(BIN)/buf build -o proto/accepted.binpb

lock: $(VENV)/.stamp ## Resolve the dependencies of pyproject.toml anew into requirements.lock
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --extra dev --generate-hashes --no-emit-index-url \
		--no-header --upgrade pyproject.toml -o requirements.lock

# ---- measure -------------------------------------------------------------------------------------------------------
.PHONY: bench-policy bench-pod bench-datapath bench-cni bench-ipam bench-identity bench-lb bench-sockaccel bench
bench-pod: install ## Pod to pod: request/response, connections, streams, against veth and bridge
	@$(BIN)/python -m bench.pod
	@$(BIN)/python -m bench.polpod

bench-datapath: install ## Nanoseconds a packet, against a fixed yardstick
	@$(BIN)/python -m bench.datapath
	@$(BIN)/python -m bench.lbpath
	@$(BIN)/python -m bench.lbprefilter
	@$(BIN)/python -m bench.polpath

bench-cni: install ## CNI ADD and DEL, against bridge and host-local
	@$(BIN)/python -m bench.cni

bench-ipam: install ## Allocation rates, memory, start-up
	@$(BIN)/python -m bench.ipam
	@$(BIN)/python -m bench.node

bench-identity: install ## Identities a second; addresses: from node to node, cold start, cost of one change
	@$(BIN)/python -m bench.identity
	@$(BIN)/python -m bench.propagation
	@$(BIN)/python -m bench.ipcache

bench-lb: install ## Connections to 1 to 50,000 services, programming them; against iptables and nftables
	@$(BIN)/python -m bench.lb
	@$(BIN)/python -m bench.lbsock
	@$(BIN)/python -m bench.lbpps

bench-policy: install ## Changes of policies until enforced, identities, memory
	@$(BIN)/python -m bench.policy

bench-sockaccel: install ## Connections within the node, handed over: against loopback, pods with policy, unix sockets; HTTPS looked into
	@$(BIN)/python -m bench.sockaccel
	@$(BIN)/python -m bench.sidecar
	@$(BIN)/python -m bench.tls

bench: bench-datapath bench-ipam bench-cni bench-identity bench-lb bench-policy bench-sockaccel \
	bench-pod ## All benchmarks, one JSON object a line
