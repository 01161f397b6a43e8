#!/bin/sh
# Builds the pod kernel: a stripped PVH vmlinux from Debian's linux-source and
# the fragment `config` beside this script.
#
#   build.sh -o OUT     build (or take from the cache) and put vmlinux at OUT
#   build.sh -c         only run Kconfig and check that the fragment survived
#   build.sh -k         print the cache key
#   -j N                compile jobs (default: all processors)
#
# The result is cached in ${ATOLL_CACHE:-$HOME/.cache/atoll}/kernel-<key>, where
# the key covers the fragment, this script, the source package and the compiler.
# Nothing is installed: missing Debian packages are named and the script fails.
set -eu

source_pkg=linux-source-6.1
source_tar=/usr/src/$source_pkg.tar.xz
here=$(cd "$(dirname "$0")" && pwd)
cache=${ATOLL_CACHE:-$HOME/.cache/atoll}

say() { echo "kernel: $*" >&2; }
die() { say "$*"; exit 1; }

# Names every package the build needs and does not find.
require_packages() {
	missing=
	for pkg in "$source_pkg" gcc make flex bison bc libelf-dev libssl-dev xz-utils cpio binutils; do
		case $(dpkg-query -W -f '${Status}' "$pkg" 2>/dev/null) in
		"install ok installed") ;;
		*) missing="$missing $pkg" ;;
		esac
	done
	[ -z "$missing" ] || die "missing Debian packages; install them with: apt-get install$missing"
	[ -r "$source_tar" ] || die "$source_tar is missing; reinstall it with: apt-get install --reinstall $source_pkg"
}

cache_key() {
	{
		cat "$here/config" "$here/build.sh"
		dpkg-query -W -f '${Package} ${Version}\n' "$source_pkg" binutils
		gcc --version | head -n 1
	} | sha256sum | cut -c 1-16
}

# Every line of the fragment must hold in the final .config: Kconfig drops a
# line whose dependencies are off without a word.
check_config() {
	lost=$(grep -E '^CONFIG_[A-Z0-9_]+=' "$here/config" | while IFS= read -r line; do
		name=${line%%=*}
		if [ "${line#*=}" = n ]; then
			! grep -q "^$name=" "$1" || { say "option is on but should be off: $name"; echo lost; }
		else
			grep -qxF "$line" "$1" || { say "option was dropped by Kconfig: $line"; echo lost; }
		fi
	done)
	[ -z "$lost" ] || die "the fragment did not survive Kconfig; see the options above"
}

unpack_source() {
	say "unpacking $source_tar"
	tar -C "$work" -xf "$source_tar" --strip-components=1 \
		--exclude="$source_pkg/tools/perf" --exclude="$source_pkg/tools/testing"
}

kmake() {
	# Fixed names and times make the build reproducible.
	make -C "$work" -s ARCH=x86_64 LOCALVERSION= KBUILD_BUILD_USER=atoll \
		KBUILD_BUILD_HOST=atoll KBUILD_BUILD_VERSION=1 \
		KBUILD_BUILD_TIMESTAMP='2025-01-01 00:00:00 UTC' "$@"
}

publish() {
	[ -n "$out" ] || return 0
	mkdir -p "$(dirname "$out")"
	cp "$cached/vmlinux" "$out.tmp.$$"
	mv -f "$out.tmp.$$" "$out"
	say "wrote $out"
}

out= mode=build jobs=$(nproc)
while getopts o:j:ck opt; do
	case $opt in
	o) out=$OPTARG ;;
	j) jobs=$OPTARG ;;
	c) mode=check ;;
	k) mode=key ;;
	*) die "usage: build.sh [-o OUT] [-j N] [-c | -k]" ;;
	esac
done

require_packages
key=$(cache_key)
cached=$cache/kernel-$key
if [ "$mode" = key ]; then
	echo "$key"
	exit
fi
if [ "$mode" = build ] && [ -s "$cached/vmlinux" ]; then
	say "using cached kernel-$key"
	publish
	exit
fi

mkdir -p "$cache"
work=$(mktemp -d "$cache/kernel-build.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM HUP
unpack_source
kmake KCONFIG_ALLCONFIG="$here/config" allnoconfig
check_config "$work/.config"
if [ "$mode" = check ]; then
	say "all options of the fragment survived Kconfig"
	exit
fi

say "compiling with $jobs jobs; this takes about ten minutes on two processors"
kmake -j"$jobs" vmlinux
mkdir -p "$work/result"
objcopy --strip-all "$work/vmlinux" "$work/result/vmlinux"
cp "$work/.config" "$work/result/config"
rm -rf "$cached"
mv "$work/result" "$cached"
say "built kernel-$key ($(stat -c %s "$cached/vmlinux") bytes)"
publish
