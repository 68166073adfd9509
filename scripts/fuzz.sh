#!/usr/bin/env bash
# Runs every fuzz target whose name matches a regular expression for a while, one after the other.
#
#   scripts/fuzz.sh REGEXP TIME
#
# An input that fails is left under testdata/fuzz, where every later test run tries it again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -eq 2 ] || { echo "usage: $0 REGEXP TIME" >&2; exit 2; }

count=0
while IFS=: read -r file name; do
	[[ $name =~ $1 ]] || continue
	count=$((count + 1))
	echo "fuzz: $name in ${file%/*} for $2"
	go test -run '^$' -fuzz "^$name\$" -fuzztime "$2" "${file%/*}"
done < <(grep -roE --include='*_test.go' '^func Fuzz[A-Za-z0-9_]*' . | sed 's/:func /:/' | sort)
[ "$count" -gt 0 ] || { echo "fuzz: no target matches $1" >&2; exit 1; }
