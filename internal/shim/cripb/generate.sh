#!/bin/sh
# Regenerates the Go code. Needs protoc (Debian: protobuf-compiler); the plugin is pinned in go.mod.
set -eu
cd "$(dirname "$0")"
bin=$(mktemp -d)
trap 'rm -rf "$bin"' EXIT
printf '#!/bin/sh\nexec go tool protoc-gen-go "$@"\n' >"$bin/protoc-gen-go"
chmod +x "$bin/protoc-gen-go"
PATH="$bin:$PATH" protoc --go_out=. --go_opt=paths=source_relative sandbox.proto
