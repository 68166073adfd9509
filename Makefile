# cowherd's one Makefile. `make help` lists the targets; a line that starts with two hashes describes the target below
# it. Whatever takes more than a line of shell is in scripts/.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := build

ifeq ($(shell command -v go),)
$(error Go 1.26 or later is needed)
endif

# Pure Go everywhere but under the race detector, so that what is tested is what is built. Stamping by the go command
# is off because it fails in a checkout without history or with a foreign owner; VERSION does it instead.
export CGO_ENABLED := 0
export GOFLAGS := $(strip $(shell go env GOFLAGS) -buildvcs=false)
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null)

# What can be set on the command line.
PKG        ?= ./...
TESTFLAGS  ?=
BENCH      ?= .
BENCHFLAGS ?= -benchmem
COUNT      ?= 20
FUZZ       ?= .
FUZZTIME   ?= 30s
CRASHTIME  ?= 2h
IMAGE      ?=
PEERSFLAGS ?=
STUDY      ?=

TOOLS      := bin/tools
BENCHMARKED = $(shell grep -rl --include='*_test.go' '^func Benchmark' . | xargs -r dirname | sort -u)

.PHONY: build demo test interop check fmt vet staticcheck checklocks archtest cross tools bench bench-peers study stress kill fuzz crash clean help

# Installed, that is copied, as it is where people use it: as the linker leaves it in the page cache, the program starts up to
# 0.7 ms later, a quarter of the whole.
## build: bin/cowherd (what plain `make` does)
build:
	@go build -trimpath $(if $(VERSION),-ldflags '-X main.version=$(VERSION)') -o bin/linked/cowherd ./cmd/cowherd
	@cmp -s bin/linked/cowherd bin/cowherd || install bin/linked/cowherd bin/cowherd

## demo: freeze an image that is being written, prove it, show what it costs (IMAGE=file: with a copy of that image)
demo: build
	@bin/cowherd demo $(IMAGE)

## test: install the foreign clients if allowed, then all tests, plain and under the race detector (PKG, TESTFLAGS)
test:
	@scripts/clients.sh test
	@TESTFLAGS='$(TESTFLAGS)' scripts/test.sh $(PKG)

## interop: hand snapshots to and fro between cowherd and a Linux under emulation, a few minutes (TESTFLAGS, KERNEL)
interop:
	@scripts/clients.sh interop
	@mkdir -p $(TOOLS)
	@go build -o $(TOOLS)/testsummary ./internal/testsummary
	@read -ra flags <<<'$(TESTFLAGS)'; \
		go test -tags interop -count=1 -timeout 30m -json "$${flags[@]}" ./test/interop | $(TOOLS)/testsummary

## check: everything that can be found without running the program
check: fmt vet staticcheck checklocks archtest cross
	@echo 'check: all is well'

## fmt: gofmt would change nothing
fmt:
	@files=$$(gofmt -l .); [ -z "$$files" ] || { echo "gofmt -w is needed for:"; echo "$$files"; exit 1; }

## vet: go vet
vet:
	go vet -tags interop $(PKG)

## staticcheck: staticcheck, configured by staticcheck.conf
staticcheck: tools
	$(TOOLS)/staticcheck -tags interop $(PKG)

## checklocks: fields and functions annotated with +checklocks are used with their lock held
checklocks: tools
	go vet -tags interop -vettool=$(CURDIR)/$(TOOLS)/checklocks $(PKG)

## archtest: imports point down the layers only; lock annotations are written so that checklocks sees them
archtest:
	go test ./internal/archtest

## cross: builds for each platform, test code included
cross:
	GOOS=linux GOARCH=amd64 go build ./...
	GOOS=linux GOARCH=arm64 go build ./...
	GOOS=linux GOARCH=arm64 go vet -tags interop ./...

# Always asked for and seldom built: the go command knows whether tools/go.mod or Go itself has changed.
tools:
	@mkdir -p $(TOOLS)
	@go build -C tools -o $(CURDIR)/$(TOOLS)/ tool

## bench: Go benchmarks (BENCH=regexp; BENCHFLAGS='-benchmem -count=10' for benchstat), copy engines, other servers
bench: build
	go test -run '^$$' -bench '$(BENCH)' $(BENCHFLAGS) $(BENCHMARKED)
	bin/cowherd bench kcopyd
	scripts/clients.sh bench
	bench/peers/run.sh

## bench-peers: one table of ratios to other NBD servers, other copy programs and the kernel's targets (PEERSFLAGS=-h)
bench-peers:
	bench/peers/run.sh all $(PEERSFLAGS)

## study: the plans of docs/study on this machine, some 20 minutes, best with nothing else on it (STUDY='NAME...', STUDY_FLAGS)
study:
	docs/study/run.sh $(STUDY)

## stress: the tests COUNT times under the race detector (PKG=./kcopyd/... for one part)
stress:
	CGO_ENABLED=1 go test -race -failfast -timeout 2h -count $(COUNT) $(TESTFLAGS) $(PKG)

## kill: kill -9 of the daemon under load COUNT times in each test, with verification after each (COUNT=50)
kill:
	COWHERD_KILLS=$(COUNT) go test -count=1 -timeout 2h -run TestKill -v ./test/conformance

## fuzz: every fuzz target for FUZZTIME (FUZZ=regexp of names)
fuzz:
	@scripts/fuzz.sh '$(FUZZ)' '$(FUZZTIME)'

## crash: crash tests with new seeds for CRASHTIME
crash:
	go test ./test/crash -count=1 -timeout 0 -for $(CRASHTIME)

## clean: remove what make built
clean:
	rm -rf bin

## help: this list
help:
	@sed -n 's/^## \([a-z-]*\): /\1\t/p' Makefile | while IFS=$$'\t' read -r name text; do \
		printf '  make %-12s %s\n' "$$name" "$$text"; done
