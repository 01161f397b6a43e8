#!/bin/bash
# Builds the disk of a Debian 12 cloud image from a recipe, as root (mmdebstrap
# runs the packages' scripts in a chroot).
#
#   build.sh -o OUT.qcow2 RECIPE-DIR     build (or take from the cache) and put the image at OUT
#   build.sh -k RECIPE-DIR               print the cache key
#
# A recipe directory has a list `packages`, perhaps a directory `files` that is
# copied over the system, and perhaps a script `setup` that runs in it before
# anything is installed. A recipe with a file `base` adds to the recipe it names.
#
# The result is cached in ${ATOLL_CACHE:-$HOME/.cache/atoll}/disks, by the hash of
# the recipe, of this script and of the packages that apt chooses. Times, UUIDs, ids
# and the order of files are fixed, there are no host keys and no machine id, so
# the same packages give the same bytes.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
cache=${ATOLL_CACHE:-$HOME/.cache/atoll}
export SOURCE_DATE_EPOCH=1735689600 LC_ALL=C
suite=bookworm
fs_uuid=6a746f6c-6c00-4000-8000-646562313200

say() { echo "debian image: $*" >&2; }
die() { say "$*"; exit 1; }

out= mode=build
while getopts o:k opt; do
	case $opt in
	o) out=$OPTARG ;;
	k) mode=key ;;
	*) die "usage: build.sh -o OUT.qcow2 RECIPE-DIR" ;;
	esac
done
shift $((OPTIND - 1))
[ $# = 1 ] || die "usage: build.sh -o OUT.qcow2 RECIPE-DIR"
recipe=$(cd "$1" && pwd)
layers=("$recipe")
while [ -f "${layers[0]}/base" ]; do
	layers=("$(cd "${layers[0]}/$(cat "${layers[0]}/base")" && pwd)" "${layers[@]}")
done

for tool in mmdebstrap mkfs.ext4 qemu-img; do
	command -v $tool >/dev/null || die "$tool is missing; run: make deps"
done

packages=()
for layer in "${layers[@]}"; do
	mapfile -t more < <(sed 's/#.*//; s/[[:space:]]//g; /^$/d' "$layer/packages")
	packages+=("${more[@]}")
done

# The resolved packages are part of the key: a new version gives a new image.
chosen=$(cd "$root" && go run ./guestos/cmd/mkdisk -resolve "$(IFS=,; echo "${packages[*]}")")
key=$({
	echo "$chosen"
	for layer in "$here" "${layers[@]}"; do
		(cd "$layer" && find . -type f -print0 | sort -z | xargs -0 sha256sum && find . -type f -perm /111 | sort)
	done
	cat "$root/internal/image/disk/"{gpt,fat,system}.go
} | sha256sum | cut -c 1-32)
if [ $mode = key ]; then
	echo "$key"
	exit
fi
[ -n "$out" ] || die "usage: build.sh -o OUT.qcow2 RECIPE-DIR"

publish() {
	mkdir -p "$(dirname "$out")"
	cp --sparse=always "$cached" "$out.tmp.$$"
	mv -f "$out.tmp.$$" "$out"
	say "wrote $out ($(stat -c %s "$out") bytes)"
}
cached=$cache/disks/$key.qcow2
if [ -s "$cached" ]; then
	say "using cached $key"
	publish
	exit
fi
[ "$(id -u)" = 0 ] || die "building it needs root: mmdebstrap runs the packages' scripts in a chroot"

mkdir -p "$cache/disks"
work=$(mktemp -d "$cache/disks/debian.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT
trap 'exit 1' INT TERM HUP

# The host's own sources, for nobody but mmdebstrap; the guest gets the public ones.
sources=$work/sources
for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
	[ ! -f "$file" ] || grep -hE '^deb ' "$file" >>"$sources" || true
done
deb822=()
for file in /etc/apt/sources.list.d/*.sources; do
	[ ! -f "$file" ] || deb822+=("$file")
done
options=()
while IFS= read -r option; do
	options+=(--aptopt="$option")
done < <(apt-config dump Acquire | grep -E '^Acquire::(http|https|ftp)' || true)

say "installing ${#packages[@]} packages and their dependencies; this takes some minutes"
overlay=()
for layer in "${layers[@]}"; do
	[ ! -x "$layer/setup" ] || overlay+=(--essential-hook="chroot \"\$1\" /bin/sh -eu <'$layer/setup'")
	[ ! -d "$layer/files" ] || overlay+=(--essential-hook="cp -R --no-preserve=ownership '$layer/files/.' \"\$1/\"")
done
mmdebstrap --quiet --mode=root --variant=apt --format=directory --architectures=amd64 \
	--include="$(IFS=,; echo "${packages[*]}")" \
	--aptopt='APT::Install-Recommends "false"' --aptopt='Acquire::Languages "none"' "${options[@]}" \
	--dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
	--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
	--dpkgopt=force-confold --dpkgopt=force-unsafe-io \
	"${overlay[@]}" --customize-hook="$here/finish \"\$1\" $fs_uuid" \
	$suite "$work/root" ${sources:+$([ ! -s "$sources" ] || echo "$sources")} "${deb822[@]}"

say "making the disk"
system=$work/system
mkdir "$system"
cp "$work/root/usr/lib/grub/i386-pc/boot.img" "$work/root/boot/grub/core.img" "$system"
cp "$work/root/usr/lib/shim/shimx64.efi.signed" "$system/shimx64.efi"
cp "$work/root/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed" "$system/grubx64.efi"
rm -f "$work/root/boot/grub/core.img" "$work"/root/var/cache/apt/*.bin
cat >"$system/grub.cfg" <<END
search.fs_uuid $fs_uuid root
set prefix=(\$root)/boot/grub
configfile \$prefix/grub.cfg
END
find "$work/root" -newermt "@$SOURCE_DATE_EPOCH" -print0 | xargs -0r touch --no-dereference --date="@$SOURCE_DATE_EPOCH"
used=$(du -sm --apparent-size "$work/root" | cut -f 1)
truncate -s $((used * 13 / 10 + 300))M "$system/root.ext4"
# mkfs takes files in the order in which the kernel lists them, which in a tmpfs is
# that of their making, and their times of access and change, which are written over
# afterwards.
export E2FSPROGS_FAKE_TIME=$SOURCE_DATE_EPOCH
unshare -m --propagation private bash -euo pipefail -c '
	mkdir "$1/sorted"
	mount -t tmpfs -o mode=755,size=75% sorted "$1/sorted"
	tar -C "$1/root" --sort=name --xattrs --xattrs-include="*" --numeric-owner -c . | tar -C "$1/sorted" --xattrs --xattrs-include="*" --numeric-owner -xp
	rm -rf --one-file-system "$1/root"
	mkfs.ext4 -q -F -L root -U "$2" -m 1 -E "hash_seed=$2,lazy_itable_init=0,lazy_journal_init=0" -d "$1/sorted" "$1/system/root.ext4"
' - "$work" $fs_uuid
dumpe2fs "$system/root.ext4" 2>/dev/null | awk -v time=$SOURCE_DATE_EPOCH '
	/^Inode count:/ { count = $3 }
	/^  Free inodes:/ {
		sub(/^  Free inodes: */, "")
		ranges = split($0, range, ", ")
		for (i = 1; i <= ranges; i++) {
			ends = split(range[i], end, "-")
			for (n = end[1]; n <= end[ends]; n++) free[n + 0] = 1
		}
	}
	END { # 2 is the root; others below 11 are no files
		for (n = 2; n <= count; n = n == 2 ? 11 : n + 1) if (!(n in free)) printf "set_inode_field <%d> atime @%d\nset_inode_field <%d> ctime @%d\n", n, time, n, time
	}' >"$work/times"
debugfs -w -f "$work/times" "$system/root.ext4" >/dev/null 2>"$work/errors"
[ "$(wc -l <"$work/errors")" -le 1 ] || die "writing times: $(sed -n 2p "$work/errors")"
e2fsck -fn "$system/root.ext4" >"$work/errors" 2>&1 || die "the file system is damaged: $(cat "$work/errors")"
(cd "$root" && go run ./guestos/cmd/mkdisk -system "$system" -o "$work/disk.qcow2")
mv "$work/disk.qcow2" "$cached"
publish
