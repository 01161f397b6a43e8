#!/bin/sh
# Regenerates the Go code of the guest protocol. Needs protoc (Debian: protobuf-compiler); the
# plugins are pinned in go.mod and run by "go tool".
set -eu
cd "$(dirname "$0")"
bin=$(mktemp -d)
trap 'rm -rf "$bin"' EXIT
for tool in protoc-gen-go protoc-gen-go-ttrpc; do
	printf '#!/bin/sh\nexec go tool %s "$@"\n' "$tool" >"$bin/$tool"
	chmod +x "$bin/$tool"
done
PATH="$bin:$PATH" protoc --go_out=. --go_opt=paths=source_relative \
	--go-ttrpc_out=. --go-ttrpc_opt=paths=source_relative guest.proto
