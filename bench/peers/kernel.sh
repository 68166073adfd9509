# What "peers kernel" runs in the guest: fio over null block devices, bare and below the device mapper's targets. Each
# run leaves fio's JSON in /out/STEP.JOBS.ROUND. SECONDS_EACH, ROUNDS, JOBS and WITHCLONE are set before it.
set -eu
for module in /more/*; do
	case $module in
	*null_blk*) insmod "$module" nr_devices=2 gb=8 bs=4096 queue_mode=2 submit_queues=2 irqmode=1 ;;
	*) insmod "$module" ;;
	esac
done
whole=$(blockdev --getsz /dev/nullb0)
window=$((64 * 2048)) # sectors: what fits is written often

# measure STEP JOBS DEVICE SECTORS: random writes to what is there, no block twice if there are enough
measure() {
	fio --name=job --filename="$3" --size="$(($4 * 512))" --rw=randwrite --bs=4k --iodepth=32 --numjobs="$2" --group_reporting \
		--ioengine=libaio --direct=1 --randrepeat=0 --random_generator=tausworthe64 --time_based --runtime="$SECONDS_EACH" \
		--cpus_allowed_policy=split --cpus_allowed=0,1 --output-format=json --output="/out/$1.$2.$round"
}

# origin JOBS TYPE: first writes to an origin with a snapshot, and later ones to the part of it that was all copied
origin() {
	dmsetup create snap --table "0 $whole snapshot /dev/nullb0 /dev/nullb1 N 8"
	dmsetup create origin --table "0 $whole snapshot-origin /dev/nullb0"
	fio --name=fill --filename=/dev/mapper/origin --size="$((window * 512))" --rw=write --bs=64k --ioengine=libaio --direct=1 \
		--iodepth=8 --output=/dev/null
	measure later "$1" /dev/mapper/origin "$window"
	measure first "$1" /dev/mapper/origin "$whole"
	dmsetup remove origin snap
}

# clone JOBS: writes of 4 KiB to regions of 64 KiB that are not hydrated, and to such as are
clone() {
	dd if=/dev/zero of=/dev/vda bs=4k count=1 2>/dev/null
	dmsetup create clone --table "0 $whole clone /dev/vda /dev/nullb1 /dev/nullb0 128 1 no_hydration"
	measure clone-first "$1" /dev/mapper/clone "$whole"
	fio --name=fill --filename=/dev/mapper/clone --size="$((window * 512))" --rw=write --bs=64k --ioengine=libaio --direct=1 \
		--iodepth=8 --output=/dev/null
	measure clone-later "$1" /dev/mapper/clone "$window"
	dmsetup remove clone
}

for round in $(seq "$ROUNDS"); do
	for jobs in $JOBS; do
		measure bare "$jobs" /dev/nullb0 "$whole"
		origin "$jobs"
		if [ "$WITHCLONE" = yes ]; then clone "$jobs"; fi
		dmsetup create line --table "0 $whole linear /dev/nullb0 0"
		measure linear "$jobs" /dev/mapper/line "$whole"
		dmsetup remove line
	done
done
