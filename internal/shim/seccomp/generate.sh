#!/bin/sh
# Writes syscalls_<arch>.txt ("name number" lines) from golang.org/x/sys of the module file.
set -eu
cd "$(dirname "$0")"
dir=$(go list -m -f '{{.Dir}}' golang.org/x/sys)
for arch in amd64 386; do
	grep -oE 'SYS_[A-Z0-9_]+ += [0-9]+' "$dir/unix/zsysnum_linux_$arch.go" |
		sed -E 's/SYS_//; s/ += / /' | tr 'A-Z' 'a-z' | sort -k2n >"syscalls_$arch.txt"
done
