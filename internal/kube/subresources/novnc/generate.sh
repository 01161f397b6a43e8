#!/bin/sh
# Makes novnc.js of the npm package. It needs npm, and nothing in the build needs it.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
npm install --no-audit --no-fund @novnc/novnc@1.7.0 esbuild@0.25.12 >/dev/null
echo 'import RFB from "@novnc/novnc"; globalThis.RFB = RFB;' >entry.js
node_modules/.bin/esbuild entry.js --bundle --format=esm --minify-whitespace --legal-comments=none --target=es2022 --outfile="$here/novnc.js"
