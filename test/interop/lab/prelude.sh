# What the scripts of guests begin with. /dev/vda is the origin, /dev/vdb the COW device. A report is a line
# "name: text".
set -eu
PATH=/lab:$PATH
size=$(blockdev --getsz /dev/vda)
origin=/dev/mapper/origin
snap=/dev/mapper/snap

# activate TYPE CHUNK: makes the origin and the snapshot live, from a store of that type (P, PO) and chunk size
# (sectors).
activate() {
	dmsetup create snap --table "0 $size snapshot /dev/vda /dev/vdb $1 $2"
	dmsetup create origin --table "0 $size snapshot-origin /dev/vda"
}

deactivate() { dmsetup remove origin snap; }

# status DEVICE: the status line without the table's range and target.
status() { dmsetup status "$1" | cut -d ' ' -f 4-; }

# table DEVICE: the store's type, the chunk size and the features of the table line.
table() { dmsetup table "$1" | cut -d ' ' -f 6-; }

# look NAME: reports status, table and checksums of the live snapshot and origin.
look() {
	echo "$1 status: $(status snap)"
	echo "$1 table: $(table snap)"
	echo "$1 view: $(io sum $snap)"
	echo "$1 origin: $(io sum $origin)"
}

# start_merge TYPE CHUNK [MS]: merges, each write to the origin being delayed for so many milliseconds.
start_merge() {
	dmsetup create slow --table "0 $size delay /dev/vda 0 0 /dev/vda 0 ${3-0}"
	dmsetup create merge --table "0 $size snapshot-merge /dev/mapper/slow /dev/vdb $1 $2"
}

# unmerged: the sectors of exceptions that are still to be merged, with gaps.
unmerged() {
	set -- $(status merge)
	echo $((${1%/*} - $2))
}

# await_merge SECTORS: waits until no more than so many are still to be merged.
await_merge() {
	while [ "$(unmerged)" -gt "$1" ]; do sleep 0.05; done
}

stop_merge() { dmsetup remove merge slow; }

# namespace ID: the NVMe device of that namespace. In which order the kernel finds controllers is chance.
namespace() {
	set -- $(grep -lx "$1" /sys/block/nvme?n?/nsid)
	echo "/dev/$(basename "$(dirname "$1")")"
}
