#!/usr/bin/env bash
# Prints the path of a Python that can build .venv, or says in one sentence what to install.
#
# PYTHON=... names the interpreter to take; otherwise every usual place is tried, 3.12 before 3.13.
# Each candidate is run: a pyenv shim, for one, can be on the PATH and still fail.
set -uo pipefail

# Megatron's wheels exist for these versions; the first one found wins.
readonly WANTED="3.12 3.13"

# Prints "VERSION PATH" if the interpreter starts and has what pip, venv and PyTorch need.
probe() {
    "$1" -c '
import ctypes, ensurepip, ssl, sys, venv, zlib
print("%d.%d" % sys.version_info[:2], sys.executable)' 2>/dev/null
}

candidates() {
    local version directory
    for version in $WANTED; do
        type -aP "python$version"
    done
    type -aP python3 python
    for directory in "${PYENV_ROOT:-$HOME/.pyenv}/versions" "$HOME/.local/share/uv/python" \
        "$HOME/.local/share/mise/installs/python" "$HOME/.asdf/installs/python"; do
        ls -d "$directory"/*/bin/python3
    done
    ls /usr/bin/python3.1[0-9] /usr/local/bin/python3.1[0-9] /opt/python*/bin/python3 \
        /opt/homebrew/bin/python3.1[0-9]
}

if [[ -n "${PYTHON:-}" ]]; then
    found=$(probe "$PYTHON")
    for version in $WANTED; do
        [[ "$found" == "$version "* ]] && echo "${found#* }" && exit 0
    done
    echo "PYTHON=$PYTHON is not a working Python ${WANTED// / or } with venv:" \
        "name another one, or leave PYTHON unset to have one found." >&2
    exit 1
fi

probed=$(candidates 2>/dev/null | while read -r candidate; do probe "$candidate"; done)
for version in $WANTED; do
    found=$(grep -m 1 "^${version//./\\.} " <<<"$probed") && echo "${found#* }" && exit 0
done
echo "No Python ${WANTED// / or } with venv was found: install one" \
    "(\"pyenv install 3.12\", or \"apt install python3.12 python3.12-venv\")" \
    "or name it with PYTHON=/path/to/python." >&2
exit 1
