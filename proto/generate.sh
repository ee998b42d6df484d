#!/usr/bin/env bash
# Regenerates the Python code of every .proto. Usage: proto/generate.sh [OUTPUT_DIR]
set -euo pipefail
cd "$(dirname "$0")"
out=${1:-src}
bin=$(dirname "$(command -v "${PYTHON:-../.venv/bin/python}")")
rm -rf "$out/llmpilot" "$out/fmaas"
mkdir -p "$out"
find llmpilot fmaas -name '*.proto' | LC_ALL=C sort | xargs "$bin/python" -m grpc_tools.protoc -I. \
  --plugin=protoc-gen-mypy="$bin/protoc-gen-mypy" --plugin=protoc-gen-mypy_grpc="$bin/protoc-gen-mypy_grpc" \
  --python_out="$out" --grpc_python_out="$out" --mypy_out="quiet:$out" --mypy_grpc_out="quiet:$out"
