#!/usr/bin/env bash
# Runs the tests of the packages named (all, if none is), plain and then under the race detector, and sums both up:
# see internal/testsummary. TESTFLAGS is handed to go test.
#
# Many packages wait (for disks, for other programs, for a rate to pass), so two more run at a time than there are CPUs,
# and those that take longest begin first, so that none of them is left alone with idle CPUs at the end. The go command
# begins with the packages that it is given first. Its own short vet is left out: `make check` does the whole one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Where mkfs and e2fsck are, for users whose PATH lacks it.
export PATH=$PATH:/usr/sbin:/sbin
longest=(test/conformance backend/nbd test/offload backend/file cmd/cowherd target/snapshot test/crash kcopyd
	test/metamorphic target/clone bench/peers)
cpus=$(getconf _NPROCESSORS_ONLN)
flags=(-vet=off -p "$((cpus + 2))")
read -ra more <<<"${TESTFLAGS-}"
flags+=("${more[@]}")
[ $# -gt 0 ] || set -- ./...

# ordered prints the packages that its arguments stand for, the longest first.
ordered() {
	local all
	all=$(go list "$@") || return
	{ printf 'cowherd/%s\n' "${longest[@]}" | grep -xF -e "$all" || true; echo "$all"; } | awk '!seen[$0]++'
}

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
# What cannot be listed is left to go test to complain about.
if packages=$(ordered "$@" 2>/dev/null); then
	mapfile -t packages <<<"$packages"
	set -- "${packages[@]}"
fi
both "$@" | bin/tools/testsummary
