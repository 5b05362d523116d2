#!/usr/bin/env bash
# Builds .venv with everything the project needs, at the versions of constraints.txt.
#
# TORCH=newest takes the newest PyTorch that pip finds instead, TORCH=2.14.1 that one; both with the
# Triton that belongs to it. PYTHON=... names the interpreter.
#
# .venv/.complete is written last, so a build that was interrupted does not count as one.
# Nothing is done while it is newer than the files the build depends on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly VENV=.venv
readonly NEEDED_GIB=8   # the installed packages take 5 GiB, their downloads 1.5
readonly TORCH=${TORCH:-pinned}

fail() {
    echo "$*" >&2
    exit 1
}

# .venv/.complete says which PyTorch was asked for; an empty one, the pinned one.
is_complete() {
    [[ -e $VENV/.complete && $(grep . "$VENV/.complete" || echo pinned) == "$TORCH" ]] &&
        [[ $VENV/.complete -nt pyproject.toml && $VENV/.complete -nt constraints.txt ]] &&
        "$VENV/bin/python" -c "" 2>/dev/null
}

# Prints constraints.txt, with the PyTorch that is wanted.
constraints() {
    case $TORCH in
        pinned) cat constraints.txt ;;
        newest) grep -vE '^(torch|triton)==' constraints.txt ;;
        *) sed -E "s/^torch==.*/torch==$TORCH/; /^triton==/d" constraints.txt ;;
    esac
}

create() {
    local python free_gib
    if [[ -d $VENV && ! -e $VENV/.building ]]; then
        fail "$PWD/$VENV was not made by \"make venv\": move it away or remove it, then run this again."
    fi
    python=$(scripts/find_python.sh) || exit 1
    free_gib=$(df -Pk . | awk 'NR == 2 {print int($4 / 2^20)}')
    if ((free_gib < NEEDED_GIB)); then
        fail "The packages need $NEEDED_GIB GiB and $PWD has $free_gib GiB free:" \
            "free some space, then run this again."
    fi
    echo "Building $VENV with $python: about 1.5 GB to download, two to five minutes."
    rm -rf "$VENV"
    mkdir "$VENV"
    touch "$VENV/.building"
    "$python" -m venv "$VENV"
}

# Shows pip's large downloads only; everything it says is in the log.
install() {
    local log=$VENV/install.log
    echo "Installing the packages, $TORCH PyTorch (log: $log)."
    constraints >"$VENV/constraints.txt"
    # --upgrade is for a PyTorch that is there already, and older than the newest.
    if ! "$VENV/bin/python" -m pip install --disable-pip-version-check --progress-bar off --upgrade \
        -c "$VENV/constraints.txt" -e '.[quickstart,examples,test,dev]' torch 2>&1 | tee "$log" |
        { grep --line-buffered -oE 'Downloading .*\([0-9]{3}.* MB\)' || true; }; then
        fail "Installing the packages failed (the whole log is $PWD/$log):" \
            "$(grep '^ERROR' "$log" | tail -n 1)"
    fi
}

[[ $TORCH =~ ^(pinned|newest|[0-9]+(\.[0-9]+)*)$ ]] ||
    fail "TORCH=$TORCH is not allowed: use newest, a version such as 2.14.1, or leave it unset."
is_complete && exit 0
if [[ -e $VENV/.complete ]] && "$VENV/bin/python" -c "" 2>/dev/null; then
    mv "$VENV/.complete" "$VENV/.building"   # only the packages changed
else
    [[ -e $VENV/.complete ]] && mv "$VENV/.complete" "$VENV/.building"
    create
fi
install
mv "$VENV/.building" "$VENV/.complete"
echo "$TORCH" >"$VENV/.complete"
echo "$VENV is ready."
