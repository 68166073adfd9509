# What the scripts of guests with clones begin with, after prelude.sh. /dev/vda is the source, /dev/vdb the destination,
# /dev/vdc the metadata device.
clone=/dev/mapper/clone

# activate_clone REGION THRESHOLD BATCH: makes the clone live, with regions of that size (sectors) and hydration off.
activate_clone() {
	dmsetup create slow --table "0 $size delay /dev/vda 0 0"
	dmsetup create clone --table "0 $size clone /dev/vdc /dev/vdb /dev/mapper/slow $1 \
		1 no_hydration 4 hydration_threshold $2 hydration_batch_size $3"
}

deactivate_clone() { dmsetup remove clone slow; }

# look_clone NAME: reports the status and the checksum of the live clone.
look_clone() {
	echo "$1 status: $(status clone)"
	echo "$1 view: $(io sum $clone)"
}

# hydrated: the number of hydrated regions.
hydrated() {
	set -- $(status clone)
	echo "${4%/*}"
}

# slow_source MS: from now on reads of the source take so many milliseconds.
slow_source() {
	dmsetup load slow --table "0 $size delay /dev/vda 0 $1"
	dmsetup resume slow
}

# start_hydration MS: hydrates in the background. The source is as slow meanwhile, so that it lasts for a while.
start_hydration() {
	slow_source "$1"
	dmsetup message clone 0 enable_hydration
}

# await_hydrated COUNT: waits until so many regions are hydrated, or all.
await_hydrated() {
	while set -- "$1" $(status clone) && [ "${5%/*}" -lt "$1" ] && [ "${5%/*}" -lt "${5#*/}" ]; do sleep 0.02; done
}

# hydrate PERCENT [MS]: hydrates in the background, until so much of what was not hydrated is, or a little more: a
# hydration that is stopped ends with what it has begun.
hydrate() {
	set -- "$1" "${2-0}" $(status clone)
	start_hydration "$2"
	await_hydrated $((${6%/*} + (${6#*/} - ${6%/*}) * $1 / 100))
	dmsetup message clone 0 disable_hydration
	while set -- $(status clone) && [ "$5" -gt 0 ]; do sleep 0.02; done
	slow_source 0
}

# discard START COUNT: discards sectors of the clone.
discard() { blkdiscard -o $(($1 * 512)) -l $(($2 * 512)) $clone; }
