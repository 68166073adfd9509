#!/usr/bin/env bash
# How much of the time lies on instructions that lock a cache line: docs/study/locks.sh [FLAGS of cowherd bench run]. It needs perf,
# objdump and x86. A sample counts if it is at such an instruction or at the next one, where the processor stops when it was slow.
# Prints the share of all of them together, and the functions that have most.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
flags=("$@")
[ ${#flags[@]} -gt 0 ] || flags=(--only '^first-write' --engine scaled --device null)
make --no-print-directory build
perf record -q -F 5000 -o "$work/perf" -- bin/cowherd bench run docs/study/plans/stages.toml "${flags[@]}" >/dev/null
perf script -i "$work/perf" -F ip 2>/dev/null | awk '{ print $1 }' >"$work/samples"
objdump -d --no-show-raw-insn bin/cowherd | awk '
	FILENAME == "-" && /^[0-9a-f]+ <.*>:$/ { name = $2; next }
	FILENAME == "-" && /^ *[0-9a-f]+:/ {
		at = $1; sub(":", "", at)
		locked = /\tlock / || /\txchg .*\(/
		if (locked || before) who[at] = name
		before = locked
		next
	}
	FILENAME == "-" { next }
	{ all++; if ($1 in who) { sum++; of[who[$1]]++ } }
	END {
		printf "%d samples, %.2f %% at locked instructions\n", all, 100 * sum / all
		for (f in of) printf "%6.2f %%  %s\n", 100 * of[f] / all, f | "sort -rn | head -25"
	}' - "$work/samples"
