#!/usr/bin/env bash
# Runs the tests of the packages named (all, if none is), plain and then under the race detector, and sums both up:
# see internal/testsummary. TESTFLAGS is handed to go test.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Where mkfs and e2fsck are, for users whose PATH lacks it.
export PATH=$PATH:/usr/sbin:/sbin
read -ra flags <<<"${TESTFLAGS-}"
[ $# -gt 0 ] || set -- ./...

# both prints the events of both runs; it fails if either does.
both() {
	local failed=0
	echo 'run: plain'
	go test -json "${flags[@]}" "$@" || failed=1
	if CGO_ENABLED=1 go build -race runtime/cgo 2>/dev/null; then
		echo 'run: race'
		CGO_ENABLED=1 go test -race -json "${flags[@]}" "$@" || failed=1
	else
		echo 'skipped: the run under the race detector: it needs a C compiler (gcc and libc6-dev)'
	fi
	return $failed
}

# Built, not run: go run would add a line of its own behind the summary's last.
mkdir -p bin/tools
go build -o bin/tools/testsummary ./internal/testsummary
both "$@" | bin/tools/testsummary
