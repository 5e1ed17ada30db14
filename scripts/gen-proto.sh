#!/bin/sh
# Generate the Python package `fibril` (messages, gRPC stubs, type stubs) from proto/.
# It is committed, so that users need no compiler; `make lint` fails when it is out of date.
set -eu
cd "$(dirname "$0")/.."
bin=${PYTHON_BIN_DIR:-.venv/bin}
out=${1:-.}
PATH="$bin:$PATH" "$bin/python" -m grpc_tools.protoc -I proto --python_out="$out" --mypy_out=quiet:"$out" \
	--grpc_python_out="$out" --mypy_grpc_out=quiet:"$out" $(find proto -name '*.proto' | sort)
find "$out/fibril" -type d -exec touch {}/__init__.py \;
