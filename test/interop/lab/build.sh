#!/usr/bin/env bash
# Makes the lab, a kernel and a root file system for the guest of the interop tests, and prints its directory. Once it
# is there that takes no time.
#
# The kernel comes from Debian's package, which is unpacked and not installed: the newest of those without hardware
# drivers that apt offers, or that which KERNEL names (6.12.5-cloud-amd64). The file system is an initramfs of busybox,
# dmsetup, the modules below and init. The lab is kept in $XDG_CACHE_HOME/cowherd/lab, or in bin/lab without that
# variable, and made anew when this script, init, or KERNEL changes.
#
# Fails, and says why, where it cannot be made; programs that it needs are installed by scripts/clients.sh.
set -Eeuo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PATH=$PATH:/usr/sbin:/sbin

# What the guest has: modules with all that they need, and programs with their libraries.
modules=(virtio_blk nvme dm-snapshot dm-delay dm-flakey dm-log-writes dm-zero)
programs=(dmsetup)

fail() {
	echo "lab: $*" >&2
	exit 1
}

# newest names the newest kernel that apt offers.
newest() {
	apt-cache pkgnames linux-image- | sed -n 's/^linux-image-\([0-9].*-cloud-amd64\)$/\1/p' | sort -V | tail -n 1
}

# fetch unpacks the package of kernel $1 to the directory $2.
fetch() {
	echo "lab: downloading Linux $1" >&2
	(cd "$scratch" && apt-get -qq -o APT::Sandbox::User=root download "linux-image-$1" >&2) ||
		fail "the package linux-image-$1 cannot be downloaded"
	dpkg -x "$scratch"/*.deb "$2"
	depmod -b "$2" "$1"
}

# number prints the little-endian number of $3 bytes at offset $2 of a file.
number() { od -An -t "u$3" -j "$2" -N "$3" "$1" | tr -d ' '; }

# uncompress prints the kernel proper of the bzImage $1, so that the guest need not uncompress it under emulation. Where
# it lies is told by the header of the x86 boot protocol (version 2.08: setup_sects, payload_offset, payload_length);
# behind what xz and zstd have compressed the kernel's build has put its size, 4 bytes.
uncompress() {
	local start length
	start=$((($(number "$1" 497 1) + 1) * 512 + $(number "$1" 584 4)))
	length=$(number "$1" 588 4)
	case $(number "$1" "$start" 4) in
	4247762216) part "$1" "$start" $((length - 4)) | zstd -dcq ;; # 28 b5 2f fd
	1484404733) part "$1" "$start" $((length - 4)) | xz -dc ;;    # fd 37 7a 58
	*) fail "$1 is compressed by a method that is not known here" ;;
	esac
}

# part prints $3 bytes from offset $2 of a file.
part() { head -c $(($2 + $3)) "$1" | tail -c "$3"; }

# add_modules copies modules of kernel $2, unpacked in $1, to the root file system $3, named in the order of their
# loading.
add_modules() {
	local name path count=100
	mkdir -p "$3/modules"
	for name in "${modules[@]}"; do
		modprobe -d "$1" -S "$2" --show-depends "$name" || fail "Linux $2 has no module $name"
	done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' | while read -r path; do
		name=$3/modules/$((count++))-$(basename "${path%.xz}")
		case $path in
		*.xz) xz -dc "$path" >"$name" ;;
		*) cp "$path" "$name" ;;
		esac
	done
}

# add_program copies a program and its libraries to the root file system $2.
add_program() {
	local path library
	path=$(command -v "$1") || fail "$1 is missing"
	cp -L "$path" "$2/bin/$1"
	{ ldd "$path" 2>/dev/null || true; } | sed -n 's,^[^/]*\(/[^ ]*\).*,\1,p' | while read -r library; do
		mkdir -p "$2$(dirname "$library")"
		cp -L "$library" "$2$library"
	done
}

# make_root prints the initramfs for kernel $2, which is unpacked in $1.
make_root() {
	local root=$scratch/root name
	mkdir -p "$root"/{bin,dev,lab,out,proc,sys,tmp}
	cp "$here/init" "$root/init"
	add_program busybox "$root"
	for name in $(busybox --list); do
		[ -e "$root/bin/$name" ] || ln -s busybox "$root/bin/$name"
	done
	for name in "${programs[@]}"; do add_program "$name" "$root"; done
	add_modules "$1" "$2" "$root"
	(cd "$root" && find . | LC_ALL=C sort | busybox cpio -o -H newc 2>/dev/null)
}

[ "$(uname -m)" = x86_64 ] || fail "it is for x86_64, this is $(uname -m)"
command -v apt-get >/dev/null || fail "the kernel comes from Debian's packages, and there is no apt-get"
for need in qemu-system-x86_64 busybox dmsetup depmod modprobe zstd xz; do
	command -v "$need" >/dev/null || fail "$need is missing"
done
lab=${XDG_CACHE_HOME:+$XDG_CACHE_HOME/cowherd/lab}
lab=${lab:-$(cd "$here/../../.." && pwd)/bin/lab}
mkdir -p "$lab"
exec 9>"$lab/lock"
flock 9
trap 'echo "lab: failed in line $LINENO" >&2' ERR

recipe=$(cat "${BASH_SOURCE[0]}" "$here/init" - <<<"${KERNEL-}" | sha256sum)
if [ "$(cat "$lab/recipe" 2>/dev/null)" != "$recipe" ]; then
	rm -f "$lab/recipe"
	scratch=$(mktemp -d)
	trap 'rm -rf "$scratch"' EXIT
	kernel=${KERNEL:-$(newest)}
	[ -n "$kernel" ] || fail "apt knows of no linux-image-...-cloud-amd64: apt-get update may help"
	if [ ! -d "$lab/$kernel" ]; then
		rm -rf "$lab/new"
		fetch "$kernel" "$lab/new"
		mv "$lab/new" "$lab/$kernel"
	fi
	uncompress "$lab/$kernel/boot/vmlinuz-$kernel" >"$lab/kernel"
	make_root "$lab/$kernel" "$kernel" >"$lab/root.cpio"
	echo "$recipe" >"$lab/recipe"
fi
echo "$lab"
