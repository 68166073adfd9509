#!/usr/bin/env bash
# Runs the plans of the study, one after the other, and keeps what they find:
#
#   docs/study/run.sh [NAME...]      all that the list at the end names, or only these
#
#   docs/study/data/NAME.json.gz     the results (cowherd bench --brief): zcat FILE | cowherd bench show -
#   docs/study/data/NAME/*.svg       some of the plots
#   bin/study/NAME/                  the whole report, with report.html
#
# Plans that need a file system run on a new one, on a loop device over a file in IMAGES (by default in memory: /dev/shm), and need
# root. Mounts are made in a mount namespace of this script's own, the files have no name any more when they are mounted, and a loop
# device ends with its mount: whatever becomes of the script, nothing is left behind.
#
# On a machine with other load the figures are worth little. STUDY_FLAGS are further flags for all plans: STUDY_FLAGS='--time 5ms' tries
# whether all is well, in a few minutes. STUDY_DATA is where the results go.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [ "$(id -u)" = 0 ] && [ -z "${STUDY_INSIDE-}" ]; then
	make --no-print-directory build
	STUDY_INSIDE=yes exec unshare --mount --propagation private -- docs/study/run.sh "$@"
fi
PATH=$PATH:/usr/sbin:/sbin
data=${STUDY_DATA:-docs/study/data} work=bin/study images=${IMAGES:-/dev/shm}
read -ra flags <<<"${STUDY_FLAGS-}"
wanted=("$@") skipped=()
mkdir -p "$data" "$work"
child=
mounted=
image=

# clean undoes what a plan has set up. It is called again at the end, also of an interrupted run.
clean() {
	if [ -n "$child" ]; then # it removes its files
		kill "$child" 2>/dev/null || true
		wait "$child" || true
	fi
	child=
	[ -z "$mounted" ] || umount "$mounted"
	mounted=
	[ -z "$image" ] || rm -f "$image"
	image=
}
trap 'clean; echo "study: $SECONDS s in all" >&2' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# fresh KIND: a new file system of 2 GiB, mounted at $work/KIND.
fresh() {
	local kind=$1 mkfs
	case $kind in
	xfs) mkfs=(mkfs.xfs -q -m reflink=1) ;;
	btrfs) mkfs=(mkfs.btrfs -q -m single) ;;
	*) echo "study: no such file system: $kind" >&2; return 1 ;;
	esac
	command -v "${mkfs[0]}" >/dev/null || { echo "study: ${mkfs[0]} is missing" >&2; return 1; }
	mkdir -p "$work/$kind"
	image=$(mktemp "$images/cowherd-study.XXXXXX")
	truncate -s 2G "$image"
	"${mkfs[@]}" "$image" >/dev/null
	mount -t "$kind" -o loop "$image" "$work/$kind"
	mounted=$work/$kind
	rm -f "$image"
	image=
}

# wants NAME: whether it is to be run.
wants() { [ ${#wanted[@]} -eq 0 ] || [[ " ${wanted[*]} " == *" $1 "* ]]; }

# run PLAN [KIND] [--plots GLOB...]: one plan of plans/, on a file system of that kind; plots whose names match are kept.
run() {
	local plan=$1 kind='' name=$1 args=() began=$SECONDS
	shift
	if [ $# -gt 0 ] && [ "$1" != --plots ]; then
		kind=$1 name=$plan-$1
		shift
	fi
	wants "$name" || return 0
	if [ -n "$kind" ]; then
		if [ "$(id -u)" != 0 ]; then
			echo "study: $name is skipped: only root may mount file systems" >&2
			skipped+=("$name")
			return
		fi
		fresh "$kind"
		args=(--dir "$work/$kind")
	fi
	[ "$plan" != stages ] || args=(--profile "$work/profiles")
	rm -rf "${work:?}/$name"
	bin/cowherd bench run "docs/study/plans/$plan.toml" --brief --report "$work/$name" "${args[@]}" "${flags[@]}" >"$work/$name.json" &
	child=$! # waited for, so that a signal is not kept waiting by it
	wait "$child"
	child=
	clean
	gzip -9nc "$work/$name.json" >"$data/$name.json.gz"
	rm -rf "${data:?}/$name"
	[ $# -eq 0 ] || keep "$name" "${@:2}"
	echo "study: $name took $((SECONDS - began)) s" >&2
}

# keep NAME GLOB...: copies plots to the data.
keep() {
	local name=$1 pattern plot
	mkdir -p "$data/$name"
	for pattern in "${@:2}"; do
		for plot in "$work/$name/"$pattern.svg; do
			[ ! -e "$plot" ] || cp "$plot" "$data/$name/"
		done
	done
}

[ -n "${STUDY_INSIDE-}" ] || make --no-print-directory build

# The model of the engines, fitted to this machine.
if wants model; then
	bin/cowherd bench model --repetitions 9 --json >"$work/model.json"
	gzip -9nc "$work/model.json" >"$data/model.json.gz"
fi

# The plans.
run engines --plots 'queue*' 'share*'
run clones
run stages
run offload-chunks --plots 'throughput-chunk-*' 'latency-chunk-*'
run offload-hydration --plots 'throughput-block-*' 'foreground-block-*'
run offload-yield --plots 'throughput-block-*' 'foreground-block-*'
run offload-remote --plots 'throughput-block-*' 'foreground-block-*'
run offload-reflink xfs --plots 'throughput-chunk-*' 'throughput-block-*' 'foreground-block-*'
run offload-worker --plots 'throughput-block-*' 'foreground-block-*'
run aftermath xfs --plots 'further-*'
run aftermath btrfs --plots 'further-*'

[ ${#skipped[@]} -eq 0 ] || { echo "study: skipped: ${skipped[*]}" >&2; exit 1; }
