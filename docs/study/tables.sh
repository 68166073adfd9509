#!/usr/bin/env bash
# Sets the study's data out in tables, in Markdown: docs/study/tables.sh > docs/study/tables.md. STUDY_DATA is where the data is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
data=${STUDY_DATA:-docs/study/data}

# table FILE TITLE FLAGS...: one table.
table() {
	local file=$data/$1.json.gz title=$2
	shift 2
	[ -e "$file" ] || return 0
	printf '\n### %s\n\n' "$title"
	zcat "$file" | bin/cowherd bench show - --markdown "$@"
}

cat <<'TEXT'
# The study's tables

Made by `docs/study/tables.sh` of what is in [data](data). A figure is the median, with the least and the greatest: of a cell's runs,
or, where several cells fall on one place, of their medians. [The study](../study.md) says what they mean.
TEXT

printf '\n## The engines\n'
by=(--rows device,jobs,depth --columns engine)
table engines 'First writes a second' --only '^first' "${by[@]}"
table engines 'First writes a second, by that of the serialised engine' --only '^first' "${by[@]}" --per engine=serialised
table engines 'First writes a second, by that with one lock' --only '^first' "${by[@]}" --per engine=onelock
table engines 'First writes, mean latency in µs' --only '^first' "${by[@]}" --quantity 'mean latency'
table engines 'First writes, mean latency by that of the serialised engine' --only '^first' "${by[@]}" --quantity 'mean latency' --per engine=serialised
table engines 'First writes, median latency by that of the serialised engine' --only '^first' "${by[@]}" --quantity 'p50 latency' --per engine=serialised
table engines 'First writes, 99th percentile in µs' --only '^first' "${by[@]}" --quantity 'p99 latency'
table engines 'First writes, processor time in µs' --only '^first' "${by[@]}" --quantity 'CPU/op'
table engines 'First writes, share of the queue that issued most copies' --only '^first' "${by[@]}" --quantity 'busiest queue'
table engines 'Later writes and bare writes a second' --only '^(later|bare)' --rows device,jobs,depth --columns name,engine
table clones 'Clones: writes of 4 KiB to regions of 64 KiB, a second' --rows jobs,depth --columns name,engine
table clones 'Clones: first writes, by the serialised engine' --only '^first' --rows jobs,depth --columns engine --per engine=serialised
table clones 'Clones: first writes, mean latency by the serialised engine' --only '^first' --rows jobs,depth --columns engine --quantity 'mean latency' --per engine=serialised

printf '\n## Copy offload: chunk copies\n'
for depth in 1 32; do
	one=(--where pattern=random --where jobs=2 --where depth=$depth --rows chunk --columns offload,engine)
	table offload-chunks "Chunks copied a second, 2 jobs, depth $depth, random" "${one[@]}"
	table offload-chunks "Foreground, median in µs, 2 jobs, depth $depth, random" "${one[@]}" --quantity 'p50 latency'
	table offload-chunks "Foreground, 99th percentile in µs, 2 jobs, depth $depth, random" "${one[@]}" --quantity 'p99 latency'
	table offload-chunks "Foreground, 99.9th percentile in µs, 2 jobs, depth $depth, random" "${one[@]}" --quantity 'p99.9 latency'
	table offload-chunks "Processor time for a chunk in µs, 2 jobs, depth $depth, random" "${one[@]}" --quantity 'CPU/op'
done
table offload-chunks 'Scaled by serialised: chunks a second' --rows chunk,depth --columns offload,jobs --per engine=serialised
table offload-chunks 'Scaled by serialised: foreground, 99th percentile' --rows chunk,depth --columns offload,jobs --quantity 'p99 latency' --per engine=serialised
table offload-chunks 'Strided by random: chunks a second' --rows chunk --columns offload,engine --per pattern=random

printf '\n## Copy offload: hydration\n'
for depth in 1 32; do
	one=(--only ^hydration --where pattern=random --where jobs=2 --where depth=$depth --rows block --columns offload,engine)
	table offload-hydration "Bytes a second, 2 streams, depth $depth, random" "${one[@]}" --quantity bytes/s
	table offload-hydration "Foreground, median in µs, 2 streams, depth $depth, random" "${one[@]}" --quantity 'foreground p50'
	table offload-hydration "Foreground, 99th percentile in µs, 2 streams, depth $depth, random" "${one[@]}" --quantity 'foreground p99'
	table offload-hydration "Processor time in ns for a byte, 2 streams, depth $depth, random" "${one[@]}" --quantity CPU/byte
done
table offload-hydration 'Scaled by serialised: bytes a second' --only ^hydration --rows block,depth --columns offload,jobs --quantity bytes/s --per engine=serialised
table offload-hydration 'What the engine chooses by itself: bytes a second, 2 streams' --only ^auto --rows block,depth --columns engine --quantity bytes/s
table offload-yield 'Copies that give way: bytes a second' --rows foreground,yield,block --columns offload,engine --quantity bytes/s
table offload-yield 'Copies that give way: foreground, 99th percentile in µs' --rows foreground,yield,block --columns offload,engine --quantity 'foreground p99'

printf '\n## Copy offload: a remote device\n'
table offload-remote 'Bytes a second' --where pattern=random --rows bandwidth,block,depth --columns offload,engine --quantity bytes/s
table offload-remote 'Offload by reading and writing: bytes a second' --rows bandwidth,block,depth --columns engine --quantity bytes/s --per offload=off
table offload-remote 'Foreground, 99th percentile in µs' --where pattern=random --rows bandwidth,block,depth --columns offload,engine --quantity 'foreground p99'

printf '\n## Copy offload: reflink on XFS\n'
table offload-reflink-xfs 'Chunks copied a second, random' --only ^chunk --where pattern=random --rows chunk,jobs,depth --columns offload,engine
table offload-reflink-xfs 'Chunks: clones by reading and writing' --only ^chunk --rows chunk,depth --columns engine --per offload=off
table offload-reflink-xfs 'Chunks: scaled by serialised' --only ^chunk --rows chunk,depth --columns offload,jobs --per engine=serialised
table offload-reflink-xfs 'Hydration: bytes a second, random' --only ^hydration --where pattern=random --rows block,jobs,depth --columns offload,engine --quantity bytes/s
table offload-reflink-xfs 'Hydration: scaled by serialised' --only ^hydration --rows block,depth --columns offload,jobs --quantity bytes/s --per engine=serialised
table offload-reflink-xfs 'Hydration: foreground, 99th percentile in µs, random' --only ^hydration --where pattern=random --rows block,jobs,depth --columns offload,engine --quantity 'foreground p99'

printf '\n## In the worker, or in a lane\n'
for quantity in bytes/s 'foreground p50' 'foreground p99' 'foreground ops'; do
	table offload-worker "$quantity" --rows copy-latency,block,depth --columns name,engine --quantity "$quantity"
done

printf '\n## The aftermath\n'
for fs in xfs btrfs; do
	[ ! -e "$data/aftermath-$fs.json.gz" ] || for quantity in $(zcat "$data/aftermath-$fs.json.gz" | grep -o '"further":{[^}]*}[^]]*' |
		grep -o '"[a-z_0-9]*":{"median"' | cut -d'"' -f2 | sort -u | grep -v -e _us$ -e '^latency' || true); do
		table aftermath-$fs "$fs: $quantity" --rows packed,block --columns offload --quantity "$quantity"
	done
done
