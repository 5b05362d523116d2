#!/usr/bin/env bash
# Writes docker/requirements-*.lock from pyproject.toml and constraints.txt: every package that the
# image installs, with the hashes of its files. Run it ("make lock") after either has changed.
#
# The locks are for x86-64 and Python 3.12. PyPI's torch is the CUDA build, for the CPU image too:
# the CPU build of PyTorch is on an index of its own, and hashes are those of one index.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly UV_VERSION=0.13.9
readonly EXTRAS=(--extra cpu --extra data --extra quickstart --extra examples --extra test)

tool=$(mktemp -d)
trap 'rm -rf "$tool"' EXIT
"${PYTHON:-python3}" -m venv "$tool"
"$tool/bin/python" -m pip install --quiet --disable-pip-version-check "uv==$UV_VERSION"

# lock FILE ARGUMENTS: these extras, and the project's own build backend.
lock() {
    local file=$1
    shift
    "$tool/bin/uv" pip compile --quiet --generate-hashes --no-annotate --no-header \
        --python-version 3.12 --python-platform x86_64-manylinux_2_28 \
        "${EXTRAS[@]}" --constraint constraints.txt --output-file "$file" pyproject.toml "$@"
    sed -i '1i # Written by docker/lock.sh ("make lock"); do not edit.' "$file"
}

rm -f docker/requirements-*.lock   # uv keeps the versions that it finds in one
lock docker/requirements-cpu.lock

# NGC's image has PyTorch and all that belongs to it; Megatron-LM is a checkout there, which compiles
# an index with pybind11.
mapfile -t ngc < <(
    grep -oE '^(torch|triton|numpy|megatron-core|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)==' \
        docker/requirements-cpu.lock | sed 's/==$//; s/^/--no-emit-package=/'
)
build=$tool/build.in
echo "pybind11==3.0.4" >"$build"
lock docker/requirements-gpu.lock "$build" "${ngc[@]}"
grep -c '==' docker/requirements-*.lock
