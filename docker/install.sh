#!/usr/bin/env bash
# The steps of the Dockerfile: install.sh cpu, gpu or project. It leaves no cache, log or bytecode.
set -euo pipefail

readonly HERE=/opt/megatron-came/docker
readonly VENV=/opt/venv

# Where "gpu" gets what no package index has, by commit: a tag can move.
readonly MEGATRON_LM=${MEGATRON_LM:-https://github.com/NVIDIA/Megatron-LM.git}
readonly MEGATRON_LM_COMMIT=5be9626709af2722333bf54797c954c09edeada3   # core_v0.19.0
readonly APEX=${APEX:-https://github.com/NVIDIA/apex.git}
readonly APEX_COMMIT=6424da3b4faa6c8f062da4a48c424fff3f02d42d

export PYTHONDONTWRITEBYTECODE=1
export PIP_CONSTRAINT=   # NGC's images constrain every package there is
# Packages are installed as the lock files say, or not at all.
PIP=(python3 -m pip --python "$VENV/bin/python" install
    --no-deps --no-compile --no-cache-dir --disable-pip-version-check --quiet)

# An environment of our own leaves the base's packages as they are, and sees them.
packages() {
    python3 -m venv --system-site-packages --without-pip "$VENV"
    "${PIP[@]}" --require-hashes --only-binary :all: -r "$HERE/requirements-$1.lock"
}

checkout() {
    local url=$1 commit=$2 folder=$3
    git init --quiet "$folder"
    git -C "$folder" fetch --quiet --depth 1 "$url" "$commit"
    git -C "$folder" -c advice.detachedHead=false checkout --quiet "$commit"
    rm -rf "$folder/.git"
}

# NVIDIA's apex, for Megatron's fused kernels; NGC's images have had it.
apex() {
    if "$VENV/bin/python" -c 'import apex, amp_C' 2>/dev/null; then
        return
    fi
    checkout "$APEX" "$APEX_COMMIT" /tmp/apex
    APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "${PIP[@]}" --no-build-isolation /tmp/apex
    rm -rf /tmp/apex
}

# Megatron-LM as a checkout, with its index of data compiled, on our Python's path.
megatron_lm() {
    checkout "$MEGATRON_LM" "$MEGATRON_LM_COMMIT" /opt/megatron-lm
    PATH=$VENV/bin:$PATH make --quiet -C /opt/megatron-lm/megatron/core/datasets
    echo /opt/megatron-lm >"$(echo "$VENV"/lib/python3.*/site-packages)/megatron-lm.pth"
}

# The base's torchrun would start the base's Python, which does not see our packages.
torchrun() {
    printf '#!%s\nfrom torch.distributed.run import main\nmain()\n' "$VENV/bin/python" >"$VENV/bin/torchrun"
    chmod 755 "$VENV/bin/torchrun"
}

# The package, the folders that a container writes to, and a name for user 1000. (useradd would
# write the date into the image.)
project() {
    cp -r "$HERE/.." /tmp/project   # building leaves files in the folder
    "${PIP[@]}" --no-build-isolation /tmp/project
    rm -rf /tmp/project
    mkdir -p /home/came /workspace /data /checkpoints /logs
    chmod 1777 /home/came /workspace /data /checkpoints /logs
    if ! grep -q '^[^:]*:[^:]*:1000:' /etc/passwd; then
        echo 'came:x:1000:1000::/home/came:/bin/bash' >>/etc/passwd
        echo 'came:x:1000:' >>/etc/group
    fi
}

case $1 in
    cpu) packages cpu ;;
    gpu)
        packages gpu
        torchrun
        apex
        megatron_lm
        ;;
    project) project ;;
esac
