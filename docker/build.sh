#!/usr/bin/env bash
# Builds the image of a commit, with whichever of docker, podman and buildah is there:
#
#     docker/build.sh cpu|gpu [TAG]       (megatron-came:cpu, megatron-came:gpu)
#
# The context is "git archive" of COMMIT (HEAD), so that neither files lying about nor a umask get
# in. All times in the image are the commit's. Variables: ENGINE, COMMIT; BASE and BASE_DIGEST, for
# another base; BUILD_FLAGS, more flags for the engine (a proxy's, or volumes with packages).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "docker/build.sh: $*" >&2
    exit 1
}

DEVICE=${1:-}
TAG=${2:-megatron-came:$DEVICE}
COMMIT=${COMMIT:-HEAD}
case $DEVICE in
    cpu)
        base=docker.io/library/python:3.12.12-slim-bookworm
        digest=@sha256:593bd06efe90efa80dc4eee3948be7c0fde4134606dd40d8dd8dbcade98e669c
        ;;
    gpu)
        # The image that Megatron-LM 0.19's installation page names; the digest is x86-64's.
        base=nvcr.io/nvidia/pytorch:26.01-py3
        digest=@sha256:38ed2ecb2c16d10677006d73fb0a150855d6ec81db8fc66e800b5ae92741007e
        ;;
    *) fail "say which image, cpu or gpu." ;;
esac
if [[ -n ${BASE:-} ]]; then
    base=$BASE digest=${BASE_DIGEST:-}
fi

engine=${ENGINE:-}
if [[ -z $engine ]]; then
    for engine in docker podman buildah none; do
        # A docker without its daemon is no engine.
        "$engine" info >/dev/null 2>&1 && break
    done
fi
[[ $engine != none ]] || fail "there is no docker (with its daemon), podman or buildah: install one."

revision=$(git rev-parse --verify --quiet "$COMMIT^{commit}") || fail "there is no commit $COMMIT."
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct "$revision")
export SOURCE_DATE_EPOCH
if [[ -n $(git status --porcelain) ]]; then
    echo "docker/build.sh: building commit ${revision:0:12}; what is not committed is left out." >&2
fi

context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
git archive "$revision" | tar --extract --preserve-permissions --directory "$context"

read -ra flags <<<"${BUILD_FLAGS:-}"
flags+=(
    --file "$context/docker/Dockerfile"
    --build-arg "BASE=$base"
    --build-arg "BASE_DIGEST=$digest"
    --build-arg "DEVICE=$DEVICE"
    --build-arg "REVISION=$revision"
)
case $engine in
    docker)
        docker buildx build "${flags[@]}" --build-arg SOURCE_DATE_EPOCH \
            --output "type=docker,name=$TAG,rewrite-timestamp=true" "$context"
        ;;
    podman | buildah)
        # Docker's format, as the other one has no health check.
        "$engine" build --format docker --layers --timestamp "$SOURCE_DATE_EPOCH" --tag "$TAG" \
            "${flags[@]}" "$context"
        ;;
    *) fail "ENGINE=$engine is not docker, podman or buildah." ;;
esac
echo "docker/build.sh: built $TAG with $engine from commit ${revision:0:12}."
