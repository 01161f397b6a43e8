#!/bin/sh
# Builds the exec helper: build.sh <output>. Needs gcc or another C compiler in $CC.
set -eu
out=$1
dir=$(cd "$(dirname "$0")" && pwd)
${CC:-cc} -Os -Wall -Wextra -Werror -static -nostdlib -nostartfiles -ffreestanding \
	-fno-pie -no-pie -fno-stack-protector -fno-asynchronous-unwind-tables -fcf-protection=none \
	-mno-sse -Wl,--build-id=none -Wl,-z,noexecstack -Wl,-z,norelro -s \
	-o "$out.tmp" "$dir/exec.c"
mv "$out.tmp" "$out"
