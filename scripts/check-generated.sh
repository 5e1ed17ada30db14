#!/bin/sh
# Fail when the committed generated code differs from what proto/ and bpf/abi/reasons.tsv give today.
set -eu
cd "$(dirname "$0")/.."
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
.venv/bin/python scripts/gen_reasons.py --check
scripts/gen-proto.sh "$tmp"
diff -r -x __pycache__ "$tmp/fibril" fibril >&2 || {
	echo "fibril/ is not what proto/ gives: run 'make proto' and commit the result" >&2
	exit 1
}
