#!/bin/sh
# Fail when the contracts break a client of the last accepted description (proto/accepted.binpb).
# A deliberate break gets a new package version (v2) instead; an addition is recorded with `make proto-accept`.
set -eu
cd "$(dirname "$0")/.."
.venv/bin/buf breaking --against proto/accepted.binpb || {
	echo "the contracts break their users: restore the old fields, or put the change into a new package version" >&2
	exit 1
}
