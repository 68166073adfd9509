#!/usr/bin/env bash
# Makes the lab, a kernel and a root file system for the guest of the interop tests, and prints its directory. Once it
# is there that takes no time.
#
# The kernel comes from Debian's package, which is unpacked and not installed: the newest of those without hardware
# drivers that apt offers, or that which KERNEL names (6.12.5-cloud-amd64). The file system is an initramfs of busybox,
# dmsetup, the modules below and init. Modules that Debian's kernels do not have are compiled from Debian's source of the
# same version, beside its packages of headers, which are unpacked and not installed either: 170 MiB are downloaded for
# that, and a few hundred KiB kept. The lab is kept in $XDG_CACHE_HOME/cowherd/lab, or in bin/lab without that variable,
# and made anew when this script, init, or KERNEL changes.
#
# Fails, and says why, where it cannot be made; programs that it needs are installed by scripts/clients.sh. Where only
# the compiled modules cannot be made, the lab is without them, its file "without" says why, and the next run tries
# again.
set -Eeuo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PATH=$PATH:/usr/sbin:/sbin

# What the guest has: modules with all that they need, and programs with their libraries.
modules=(virtio_blk nvme dm-snapshot dm-delay dm-flakey dm-log-writes dm-zero)
programs=(dmsetup)
# Modules that scripts load themselves, from /more.
more=(null_blk)
# Modules that are compiled, each of the objects NAME-*.o of drivers/md.
compiled=(dm-clone)

fail() {
	echo "lab: $*" >&2
	exit 1
}

# newest names the newest kernel that apt offers.
newest() {
	apt-cache pkgnames linux-image- | sed -n 's/^linux-image-\([0-9].*-cloud-amd64\)$/\1/p' | sort -V | tail -n 1
}

# unpack downloads the package $1 (NAME or NAME=VERSION) and unpacks it to the directory $2.
unpack() {
	local debs
	debs=$(mktemp -d -p "$scratch")
	(cd "$debs" && apt-get -qq -o APT::Sandbox::User=root download "$1" >&2) ||
		fail "the package $1 cannot be downloaded"
	dpkg -x "$debs"/*.deb "$2"
	rm -r "$debs"
}

# fetch unpacks the package of kernel $1 to the directory $2.
fetch() {
	echo "lab: downloading Linux $1" >&2
	unpack "linux-image-$1" "$2"
	depmod -b "$2" "$1"
}

# field prints field $2 of the package $1 as apt knows it.
field() { apt-cache show --no-all-versions "$1" | sed -n "s/^$2: //p"; }

# compile adds the compiled modules to kernel $2, which is unpacked in $1. Of the packages it needs the version that the
# kernel has, or the module would not load.
compile() {
	local version headers source name work=$scratch/compile
	for name in make gcc strip; do
		command -v "$name" >/dev/null || fail "$name is missing"
	done
	version=$(field "linux-image-$2" Version)
	source=linux-source-$(cut -d . -f 1,2 <<<"$version")
	headers=$(field "linux-headers-$2" Depends | grep -oE 'linux-(headers-[^ ,]*-common|kbuild-[^ ,]*)') ||
		fail "apt knows of no linux-headers-$2"
	for name in "linux-headers-$2" $headers; do unpack "$name" "$work"; done
	unpack "$source=$version" "$work"
	mkdir "$work/md"
	tar -xf "$work/usr/src/$source.tar.xz" -C "$work/md" --strip-components=3 --wildcards \
		"${compiled[@]/#/*/drivers/md/}"'-*' '*/drivers/md/dm*.h' '*/drivers/md/persistent-data/*.h'
	for name in "${compiled[@]}"; do
		echo "obj-m += $name.o"
		(cd "$work/md" && echo "$name-y :=" "$name"-*.c) | sed 's/\.c\b/.o/g'
	done >"$work/md/Kbuild"
	# The packages expect each other in /usr/src.
	headers=$work/usr/src/linux-headers-$2
	sed -i "s,^include /,include $work/," "$headers/Makefile"
	make -s -C "$headers" M="$work/md" CC="${CC:-gcc}" CONFIG_DEBUG_INFO_BTF_MODULES= modules
	mkdir -p "$1/lib/modules/$2/updates"
	for name in "${compiled[@]}"; do
		strip --strip-debug -o "$1/lib/modules/$2/updates/$name.ko" "$work/md/$name.ko"
	done
	depmod -b "$1" "$2"
}

# has_compiled tells whether the compiled modules have been added to kernel $2, unpacked in $1.
has_compiled() {
	local name
	for name in "${compiled[@]}"; do
		[ -e "$1/lib/modules/$2/updates/$name.ko" ] || return
	done
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

# add_modules copies modules ($4...) of kernel $2, unpacked in $1, to the directory $3, named in the order of their loading.
add_modules() {
	local name path count=100
	mkdir -p "$3"
	for name in "${@:4}"; do
		modprobe -d "$1" -S "$2" --show-depends "$name" || fail "Linux $2 has no module $name"
	done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' | while read -r path; do
		name=$3/$((count++))-$(basename "${path%.xz}")
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
	add_modules "$1" "$2" "$root/modules" "${modules[@]}"
	add_modules "$1" "$2" "$root/more" "${more[@]}"
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
if [ "$(cat "$lab/recipe" 2>/dev/null)" != "$recipe" ] || [ -e "$lab/without" ]; then
	rm -f "$lab/recipe" "$lab/without"
	scratch=$(mktemp -d)
	trap 'rm -rf "$scratch"' EXIT
	kernel=${KERNEL:-$(newest)}
	[ -n "$kernel" ] || fail "apt knows of no linux-image-...-cloud-amd64: apt-get update may help"
	if [ ! -d "$lab/$kernel" ]; then
		rm -rf "$lab/new"
		fetch "$kernel" "$lab/new"
		mv "$lab/new" "$lab/$kernel"
	fi
	if ! has_compiled "$lab/$kernel" "$kernel"; then
		# As a job, because in a condition a function goes on after an error.
		compile "$lab/$kernel" "$kernel" >"$scratch/log" 2>&1 &
		wait $! || tail -n 10 "$scratch/log" >"$lab/without"
	fi
	[ -e "$lab/without" ] || modules+=("${compiled[@]}")
	uncompress "$lab/$kernel/boot/vmlinuz-$kernel" >"$lab/kernel"
	make_root "$lab/$kernel" "$kernel" >"$lab/root.cpio"
	echo "$recipe" >"$lab/recipe"
fi
echo "$lab"
