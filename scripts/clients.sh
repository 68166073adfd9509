#!/usr/bin/env bash
# Makes sure that the programs of others that a use needs are there.
#
#   scripts/clients.sh test     what the tests talk to cowherd with, and a C compiler for the race detector
#   scripts/clients.sh bench    that, and the servers that cowherd is measured beside
#   scripts/clients.sh interop  what a guest with another kernel is made and run with
#
# Silent when nothing is missing. What is missing is installed from Debian's packages if this is root or sudo asks for
# no password; INSTALL=no forbids it. Otherwise it says what is missing and succeeds: the tests that need it are
# skipped, with their reason.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

# program:package
needs=(
	fio:fio
	qemu-img:qemu-utils qemu-io:qemu-utils
	nbdinfo:libnbd-bin nbdcopy:libnbd-bin
	nbdkit:nbdkit
	mkfs.ext4:e2fsprogs e2fsck:e2fsprogs debugfs:e2fsprogs
	mkfs.xfs:xfsprogs mkfs.btrfs:btrfs-progs
)
use=${1-}
case $use in
test) ;;
bench) needs+=(qemu-storage-daemon:qemu-system-common qemu-nbd:qemu-utils nbd-server:nbd-server) ;;
interop)
	needs=(
		qemu-system-x86_64:qemu-system-x86
		busybox:busybox-static dmsetup:dmsetup
		depmod:kmod modprobe:kmod
		xz:xz-utils zstd:zstd
		gcc:gcc make:make strip:binutils
	)
	;;
*)
	echo "usage: $0 test|bench|interop" >&2
	exit 2
	;;
esac

# has_c tells whether a C program can be built: the race detector's runtime is linked by the C compiler.
has_c() {
	echo '#include <stdlib.h>' | "${CC:-gcc}" -E -x c - >/dev/null 2>&1
}

# missing prints the packages of the programs that are not there.
missing() {
	local need
	for need in "${needs[@]}"; do
		command -v "${need%%:*}" >/dev/null || echo "${need##*:}"
	done | sort -u
	[ "$use" = interop ] || has_c || printf '%s\n' gcc libc6-dev
}

# install installs the packages named, as root or by sudo.
install() {
	local as_root=()
	command -v apt-get >/dev/null || return 1
	if [ "$(id -u)" -ne 0 ]; then
		sudo -n true 2>/dev/null || return 1
		as_root=(sudo -n)
	fi
	echo "clients: installing $* (INSTALL=no forbids it)"
	"${as_root[@]}" apt-get -qq update &&
		"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
			apt-get -qq -o Dpkg::Use-Pty=0 install -y --no-install-recommends "$@" >/dev/null
}

mapfile -t packages < <(missing)
[ ${#packages[@]} -gt 0 ] || exit 0
if [ "${INSTALL-}" != no ]; then
	if ! install "${packages[@]}"; then # one that is nowhere keeps the others out
		for package in "${packages[@]}"; do
			install "$package" || echo "clients: could not install $package"
		done
	fi
	mapfile -t packages < <(missing)
fi
if [ ${#packages[@]} -gt 0 ]; then
	echo "clients: still missing, as Debian names them: ${packages[*]}; what needs them is skipped"
fi
