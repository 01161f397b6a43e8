# Atoll's build. `make help` lists the targets. Needs Go, make, git and the
# Debian archive; sudo only where root is needed and the user is not root.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := build
MAKEFLAGS += --no-builtin-rules

# One set of flags for everything, so that builds and tests share the Go cache.
export CGO_ENABLED := 0
export GOFLAGS := -trimpath -buildvcs=false

SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
# Root, but with this user's Go and caches.
ROOT := $(if $(SUDO),sudo env PATH=$(PATH) HOME=$(HOME) CGO_ENABLED=0 GOFLAGS="$(GOFLAGS)",)
DATA_DIR ?= /var/lib/atoll
ATOLL := bin/atoll
FILES := internal/assets/files
# agnhost is built for `make conformance` only.
IMAGES := busybox nginx postgres tester
VM_IMAGES := tiny debian-12 debian-12-postgres

VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
# What nodes report: the Kubernetes version with ours as build metadata.
KUBE := $(shell sed -n 's/^.*component-base\/version.gitVersion=\(\S*\).*/\1/p' internal/kube/ldflags)
KUBE_LDFLAGS := $(subst gitVersion=$(KUBE),gitVersion=$(KUBE)+atoll.$(subst _,-,$(subst +,-,$(VERSION))),$(shell cat internal/kube/ldflags))
CONTAINERD := $(shell sed -n 's,^.*github.com/containerd/containerd/v2 v,,p' go.mod)
LDFLAGS := -s -w -X main.version=$(VERSION) $(KUBE_LDFLAGS) -X github.com/containerd/containerd/v2/version.Version=$(CONTAINERD)

# Debian packages. What the host needs at run time, what the build needs, and
# what the tests and the demo use.
RUN_PACKAGES := qemu-system-x86 qemu-system-data qemu-utils seabios ovmf swtpm ipxe-qemu runc nftables e2fsprogs kmod mount xz-utils
BUILD_PACKAGES := linux-source-6.1 gcc libc6-dev make flex bison bc libelf-dev libssl-dev xz-utils cpio binutils perl dpkg-dev mmdebstrap
TEST_PACKAGES := busybox-static curl iproute2 iptables procps bsdutils conntrack erofs-utils openssh-client protobuf-compiler xfsprogs

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: deps
deps: ## install the Debian packages that are missing
	@missing=; for p in $(RUN_PACKAGES) $(BUILD_PACKAGES) $(TEST_PACKAGES); do \
		[ "$$(dpkg-query -W -f '$${db:Status-Status}' $$p 2>/dev/null)" = installed ] || missing="$$missing $$p"; \
	done; \
	if [ -n "$$missing" ]; then \
		echo "installing:$$missing"; \
		$(SUDO) apt-get -q update || echo "the package lists could not be updated; going on with the old ones"; \
		$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends $$missing; \
	fi

# ---- build ----------------------------------------------------------------

.PHONY: build
build: deps assets ## build bin/atoll
	@mkdir -p bin
	go build -ldflags "$(LDFLAGS)" -o $(ATOLL) ./cmd/atoll
	@ls -lh $(ATOLL) | awk '{print "built", $$9, $$5}'

.PHONY: assets
assets: $(if $(filter none,$(POD_KERNEL)),,build/vmlinux) build/exec build/atoll-pod build/images/pause.tar ## build what is embedded in bin/atoll
	@go run ./internal/assets/pack $(FILES) \
		atoll-pod=build/atoll-pod $(KERNEL_ASSET) exec=build/exec pause.tar=build/images/pause.tar

# The kernel's own script caches by content, so it is always asked.
# POD_KERNEL=none leaves it out; such a binary needs `atoll up --kernel`.
build/vmlinux: FORCE | build/images
	@guestos/kernel/build.sh -o $@
KERNEL_ASSET := $(if $(filter none,$(POD_KERNEL)),,vmlinux=build/vmlinux)

build/exec: guestos/exec/exec.c guestos/exec/build.sh | build/images
	@guestos/exec/build.sh $@

build/atoll-pod: FORCE | build/images
	@go build -ldflags "-s -w" -o $@ ./cmd/atoll-pod

build/images/%.tar: FORCE | build/images
	@go run ./guestos/cmd/mkimage -o $@ guestos/images/$*

.PHONY: images
images: deps $(IMAGES:%=build/images/%.tar) build/vm/tiny.qcow2 ## build the images of demo and tests

# Disks of virtual machines. They are no container images; `atoll image import`
# takes them. Those with a whole Debian take minutes the first time.
.PHONY: vm-images
vm-images: deps $(VM_IMAGES:%=build/vm/%.qcow2) ## build the disks of virtual machines: tiny, debian-12, debian-12-postgres

build/vm/tiny.qcow2: FORCE
	@go run ./guestos/cmd/mkdisk -o $@ guestos/vm/tiny

build/vm/debian-12.qcow2 build/vm/debian-12-postgres.qcow2: build/vm/%.qcow2: FORCE
	@$(ROOT) guestos/vm/debian/build.sh -o $@ guestos/vm/$*

build/images:
	@mkdir -p $@

.PHONY: FORCE
FORCE:

# ---- checks ---------------------------------------------------------------

.PHONY: verify
verify: rules format lint generated ## all checks that run no product code
	@echo "verify: ok"

.PHONY: rules
rules: ## the rules of the repository (rules_test.go)
	go test -count=1 .

build/tools/%: tools/go.mod tools/go.sum | build/tools
	@echo "building $*"
	@cd tools && go build -o ../$@ $(TOOL_$*)
TOOL_gofumpt := mvdan.cc/gofumpt
TOOL_golangci-lint := ./lint
TOOL_gotest := ./gotest
build/tools/golangci-lint: tools/lint/main.go
build/tools/gotest: tools/gotest/main.go

build/tools:
	@mkdir -p $@

.PHONY: format
format: build/tools/gofumpt ## formatting of Go files and syntax of shell scripts
	@unformatted=$$(git ls-files -z --cached --others --exclude-standard '*.go' | grep -zv '\.pb\.go$$\|_ttrpc\.go$$' | xargs -0 build/tools/gofumpt -l); \
	if [ -n "$$unformatted" ]; then echo "not formatted with gofumpt:"; echo "$$unformatted"; exit 1; fi
	@git ls-files -z '*.sh' .ci/run | xargs -0 -n1 bash -n

# Packages whose dependencies are too many to be analysed from source; see
# docs/decisions/0006-linters-without-facts.md.
HOLDS_KUBERNETES := ^\./(cmd/atoll|internal/(agent|cli|kube|server))(/|$$)

.PHONY: lint
lint: build/tools/golangci-lint ## linters (.golangci.yml)
	@packages=$$(go list -tags integration,e2e,ceph,debian ./... | sed 's,^atoll.dev/atoll,.,'); status=0; \
	build/tools/golangci-lint run --allow-serial-runners $$(grep -vE '$(HOLDS_KUBERNETES)' <<<"$$packages") || status=1; \
	LINT_FACTS=none build/tools/golangci-lint run --allow-serial-runners $$(grep -E '$(HOLDS_KUBERNETES)' <<<"$$packages") || status=1; \
	exit $$status

.PHONY: generate
generate: ## write generated code again
	go generate ./...

.PHONY: generated
generated: deps ## fail when generated code is stale
	@scripts=$$(grep -rl --include='*.go' '^//go:generate' api internal | xargs -n1 dirname | sort -u); \
	before=$$(for d in $$scripts; do sha256sum $$d/*.go $$(ls $$d/*.yaml 2>/dev/null); done); \
	go generate $$(printf './%s ' $$scripts); \
	after=$$(for d in $$scripts; do sha256sum $$d/*.go $$(ls $$d/*.yaml 2>/dev/null); done); \
	if [ "$$before" != "$$after" ]; then echo "generated code was stale; run make generate and commit:"; diff <(echo "$$before") <(echo "$$after") || true; exit 1; fi

# ---- tests ----------------------------------------------------------------

GOTEST := build/tools/gotest

.PHONY: test-unit
test-unit: build/tools/gotest ## tests that need neither root nor QEMU
	@$(GOTEST) -stage unit -log build/test-unit.log -- -timeout 20m ./...

.PHONY: test-integration
test-integration: deps assets images build/tools/gotest ## tests of single packages that need root or QEMU
	@$(ROOT) $(GOTEST) -stage integration -log build/test-integration.log -- -p 1 -timeout 40m -tags integration \
		$$(git grep -l '^//go:build integration' -- '*_test.go' | xargs -n1 dirname | sort -u | sed 's,^,./,')

CEPH_PACKAGES := ceph-mon ceph-mgr ceph-osd ceph-common qemu-block-extra

.PHONY: test-ceph
test-ceph: RUN_PACKAGES += $(CEPH_PACKAGES)
test-ceph: deps assets build/tools/gotest ## volumes on real Ceph clusters of one, made for the tests
	@$(ROOT) $(GOTEST) -stage ceph -log build/test-ceph.log -- -p 1 -count=1 -timeout 60m -tags integration,ceph -run Ceph \
		./internal/storage/datastore/rbd ./internal/shim ./internal/storage/csi/export

E2E_STAGE := e2e
.PHONY: test-e2e
E2E_TAGS := e2e
test-e2e: build images build/tools/gotest ## a supervisor on this host, used the way a person does
	@dir=$${ATOLL_E2E_DATA_DIR:-}; \
	if [ -z "$$dir" ] && $(ROOT) $(ATOLL) status --data-dir $(DATA_DIR) 2>/dev/null | grep -q ^SERVICE; then \
		echo "a supervisor runs on $(DATA_DIR) (make demo?); the tests use it"; \
		dir=$(DATA_DIR); $(ROOT) $(ATOLL) up --detach --data-dir $$dir; \
	fi; \
	$(ROOT) env ATOLL_E2E_DATA_DIR=$$dir ATOLL_CRASH_ROUNDS='$(CRASH_ROUNDS)' ATOLL_CRASH_SEED='$(CRASH_SEED)' \
		$(GOTEST) -stage $(E2E_STAGE) -log build/test-$(E2E_STAGE).log -- -count=1 -parallel 3 -timeout 120m -tags $(E2E_TAGS) $(E2E_FLAGS) ./test/e2e

.PHONY: test-crash
test-crash: E2E_STAGE := crash
test-crash: E2E_FLAGS := -run '^TestCrash$$'
test-crash: CRASH_ROUNDS := 20
test-crash: test-e2e ## a database loses nothing when its micro-VM and the services are killed: CRASH_ROUNDS=20 CRASH_SEED=...
	@grep -o 'ATOLL_CRASH_SEED=.*\|round .*' build/test-crash.log

.PHONY: test-debian
test-debian: E2E_STAGE := debian
test-debian: E2E_TAGS := e2e,debian
test-debian: E2E_FLAGS := -run '^TestMachineDebian$$'
test-debian: build/vm/debian-12.qcow2 test-e2e ## a whole Debian as a virtual machine, which takes ten minutes where guests are emulated

.PHONY: test
test: build images build/tools/gotest ## everything: unit, integration, end to end
	@rm -f build/test-*.json
	@failed=; for stage in test-unit test-integration test-e2e; do \
		$(MAKE) --no-print-directory $$stage || failed="$$failed $$stage"; \
	done; \
	$(GOTEST) -total build; \
	if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

.PHONY: conformance
conformance: build $(patsubst guestos/images/%/image.yaml,build/images/%.tar,$(wildcard guestos/images/*/image.yaml)) ## upstream Kubernetes e2e against the running supervisor: FOCUS=... SKIP=...
	@$(ROOT) $(ATOLL) up --detach --data-dir $(DATA_DIR)
	@$(ROOT) env FOCUS='$(FOCUS)' $(if $(filter undefined,$(origin SKIP)),,SKIP='$(SKIP)') ATOLL_DATA_DIR='$(DATA_DIR)' test/conformance/run.sh

.PHONY: conformance-storage
conformance-storage: build $(patsubst guestos/images/%/image.yaml,build/images/%.tar,$(wildcard guestos/images/*/image.yaml)) ## upstream's specs for storage drivers against csi.atoll.dev: FOCUS=... SKIP=...
	@$(ROOT) $(ATOLL) up --detach --data-dir $(DATA_DIR)
	@$(ROOT) env STORAGE=1 FOCUS='$(FOCUS)' $(if $(filter undefined,$(origin SKIP)),,SKIP='$(SKIP)') ATOLL_DATA_DIR='$(DATA_DIR)' test/conformance/run.sh

.PHONY: bench
bench: build images build/images/bench.tar build/vm/debian-12.qcow2 ## measure, print a table, write bench/results/*.json
	@$(ROOT) $(ATOLL) up --detach --data-dir $(DATA_DIR)
	@$(ROOT) $(ATOLL) image load --data-dir $(DATA_DIR) build/images/busybox.tar build/images/bench.tar
	@$(ROOT) go run ./bench -data-dir $(DATA_DIR) $(BENCH_FLAGS)

# ---- use ------------------------------------------------------------------

.PHONY: demo
demo: build images build/vm/debian-12-postgres.qcow2 ## start a supervisor on this host and show a web application
	@$(ROOT) examples/demo/run.sh $(ATOLL) $(DATA_DIR)

.PHONY: demo-down
demo-down: ## remove every trace of the demo and its supervisor
	@if [ -x $(ATOLL) ]; then $(ROOT) $(ATOLL) down --purge --data-dir $(DATA_DIR); \
	elif [ -e $(DATA_DIR)/bin/atoll ]; then $(ROOT) $(DATA_DIR)/bin/atoll down --purge --data-dir $(DATA_DIR); \
	else echo "nothing to do"; fi

.PHONY: clean
clean: ## remove what was built here; caches in the home directory stay
	rm -rf bin build
	find $(FILES) -type f ! -name README -delete
