#!/usr/bin/env bash
# Is the image reproducible, and does it train? Builds it twice, compares the layers, checks its
# health, and runs the SMOKE training of GPT-2 Medium in it:
#
#     docker/verify.sh cpu|gpu
#
# Variables: those of docker/build.sh; RUN_FLAGS, more flags for running; KEEP=1 keeps the images.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

DEVICE=${1:-cpu}
if [[ -z ${ENGINE:-} ]]; then
    for ENGINE in docker podman buildah none; do
        "$ENGINE" info >/dev/null 2>&1 && break
    done
fi
export ENGINE
read -ra run_flags <<<"${RUN_FLAGS:-}"
if [[ $DEVICE == gpu ]]; then
    [[ $ENGINE == buildah ]] || run_flags+=(--gpus all)
fi
mounts=$(mktemp -d)
mkdir -m 1777 "$mounts/checkpoints" "$mounts/logs"
images=("megatron-came:$DEVICE-first" "megatron-came:$DEVICE-second")

# shellcheck disable=SC2317,SC2329  # the trap runs it
clean_up() {
    rm -rf "$mounts"
    if [[ ${KEEP:-0} != 1 ]]; then
        "$ENGINE" rmi --force "${images[@]}" >/dev/null 2>&1 || true
    fi
}
trap clean_up EXIT

# The digests of an image's layers, one a line.
layers() {
    case $ENGINE in
        buildah) buildah inspect --type image --format '{{range .OCIv1.RootFS.DiffIDs}}{{println .}}{{end}}' "$1" ;;
        *) "$ENGINE" image inspect --format '{{range .RootFS.Layers}}{{println .}}{{end}}' "$1" ;;
    esac
}

# in_image NAME=VALUE... -- COMMAND...: runs a command as the image's user.
in_image() {
    local flags=("${run_flags[@]}" --volume "$mounts/checkpoints:/checkpoints" --volume "$mounts/logs:/logs")
    local container status=0
    while [[ $1 != -- ]]; do
        flags+=(--env "$1")
        shift
    done
    shift
    if [[ $ENGINE == buildah ]]; then
        container=$(buildah from --pull-never "${images[1]}")
        # The name that buildah gives the machine is not one that can be looked up.
        buildah run --hostname localhost "${flags[@]}" "$container" -- "$@" || status=$?
        buildah rm "$container" >/dev/null
        return "$status"
    fi
    "$ENGINE" run --rm --ipc=host --ulimit memlock=-1 --entrypoint "$1" "${flags[@]}" \
        "${images[1]}" "${@:2}"
}

for image in "${images[@]}"; do
    echo "== Building $image"
    BUILD_FLAGS="${BUILD_FLAGS:-} --no-cache" "$here/build.sh" "$DEVICE" "$image"
done

echo "== Layers"
if ! diff <(layers "${images[0]}") <(layers "${images[1]}"); then
    echo "docker/verify.sh: the two builds have different layers, see above." >&2
    different=1
else
    layers "${images[0]}"
    echo "Both builds have these layers."
fi

echo "== Health"
in_image -- python /opt/megatron-came/docker/healthcheck.py

echo "== SMOKE training"
in_image SMOKE=1 -- /opt/megatron-came/docker/entrypoint.sh gpt2-medium | tee "$mounts/log" |
    grep -E ' iteration +[0-9]+/|successfully saved'
(($(grep -cE ' iteration +[0-9]+/' "$mounts/log") == 4)) || {
    echo "docker/verify.sh: the training did not do four iterations." >&2
    exit 1
}
for written in checkpoints/gpt2_medium-came/checkpoints-smoke logs/gpt2_medium-came-smoke; do
    [[ -n $(ls "$mounts/$written") ]] || {
        echo "docker/verify.sh: the training wrote nothing to what is mounted at /$written." >&2
        exit 1
    }
done
exit "${different:-0}"
