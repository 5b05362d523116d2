#!/usr/bin/env bash
# Makes a stand-in for the CPU image's base where no image can be pulled: Debian bookworm, from
# Debian's packages, with a Python 3.12 from a folder of this machine in /usr/local.
#
#     docker/local_base.sh PYTHON_FOLDER [TAG]       (localhost/python-stand-in:3.12)
#     BASE=localhost/python-stand-in:3.12 docker/build.sh cpu
#
# Run it as root, on Debian bookworm or what its Python was built for; it needs debootstrap and buildah.
set -euo pipefail

PYTHON_FOLDER=${1:?say in which folder the Python lies, as in ~/.pyenv/versions/3.12.1}
TAG=${2:-localhost/python-stand-in:3.12}

# What python:3.12-slim has besides Debian's least.
readonly LIBRARIES=ca-certificates,netbase,tzdata,libbz2-1.0,libexpat1,libffi8,liblzma5,libncursesw6
readonly MORE=libreadline8,libsqlite3-0,libssl3,libuuid1,zlib1g,libnsl2,libtirpc3

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
chmod 755 "$root"
debootstrap --variant=minbase --include="$LIBRARIES,$MORE" bookworm "$root"
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root"/var/log/*

tar --create --directory "$PYTHON_FOLDER" --exclude=__pycache__ --exclude='*.a' --exclude=test \
    bin lib include | tar --extract --directory "$root/usr/local"
rm -rf "$root"/usr/local/lib/python3.12/site-packages/[!p]* "$root"/usr/local/lib/python3.12/site-packages/p[!i]*
find "$root/usr/local/bin" -type f ! -name 'python3*' -delete
ln -sf python3.12 "$root/usr/local/bin/python3"
ln -sf python3 "$root/usr/local/bin/python"
chroot "$root" ldconfig
chroot "$root" python3 -m pip --version

container=$(buildah from scratch)
buildah add --quiet "$container" "$root" /
buildah config --env PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin --cmd python3 "$container"
buildah commit --quiet "$container" "$TAG"
buildah rm "$container" >/dev/null
