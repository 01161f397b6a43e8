#!/bin/sh
# Fetches Debian's cloud kernel, for `atoll up --kernel`, without installing it:
# downloads the package that linux-image-cloud-amd64 stands for, unpacks it into
# ${ATOLL_CACHE:-$HOME/.cache/atoll} and prints the path of the kernel image.
# Its modules are where Atoll looks for them, in ../lib/modules.
#
# Needs apt and the host's sources; apt verifies signature and hash. The host's
# package lists are used if they have the package, else lists in the cache.
set -eu

meta=linux-image-cloud-amd64
cache=${ATOLL_CACHE:-$HOME/.cache/atoll}
lists=

say() { echo "debian kernel: $*" >&2; }
die() { say "$*"; exit 1; }

# apt COMMAND... runs an apt command, with our own lists once there are some.
apt() {
	command=$1
	shift
	"$command" -q -o APT::Architecture=amd64 ${lists:+-o "Dir::State::lists=$lists" -o "Dir::Cache=$lists/cache" \
		-o Dir::Cache::pkgcache=pkgs -o Dir::Cache::srcpkgcache=sources} "$@"
}

# The package behind the meta package, with its version.
find_package() {
	name=$(apt apt-cache depends "$meta" 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9]\)/\1/p' | head -n 1)
	[ -n "$name" ] || return 1
	file=$(apt apt-get --print-uris download "$name" 2>/dev/null | sed -n "s/^'.*' \([^ /]*\)\.deb .*/\1/p" | head -n 1)
	[ -n "$file" ]
}

download() {
	(cd "$work" && apt apt-get -o APT::Sandbox::User=root download "$name" >&2)
}

update() {
	lists=$cache/debian-kernel-lists
	mkdir -p "$lists/partial" "$lists/cache/archives/partial"
	say "fetching package lists"
	apt apt-get -o APT::Sandbox::User=root -qq update >&2
}

mkdir -p "$cache"
work=$(mktemp -d "$cache/debian-kernel-unpack.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM HUP
file=
if ! find_package; then
	update
	find_package || die "the host's Debian sources do not have $meta"
fi
unpacked=$cache/debian-kernel-$(echo "$file" | tr -c 'A-Za-z0-9._+\n-' _)
if [ ! -d "$unpacked" ]; then
	# Lists that are older than the archive name a file that is gone.
	download || { update && find_package && download; } || die "$name could not be downloaded"
	mkdir "$work/root"
	dpkg-deb -x "$work"/*.deb "$work/root"
	rm -rf "$work"/root/usr "$work"/root/boot/System.map*
	chmod 755 "$work/root"
	mv "$work/root" "$unpacked" 2>/dev/null || [ -d "$unpacked" ] # another may have been faster
fi
for kernel in "$unpacked"/boot/vmlinuz-*; do
	[ -r "$kernel" ] || die "$unpacked holds no kernel; delete it"
	echo "$kernel"
done
