#!/usr/bin/env bash
# Build docker/Dockerfile.cpu without a Docker engine or a registry, and train the quickstart in the image for a few steps.
# debootstrap makes the base, a Debian without anything; buildah executes the Dockerfile in chroots. Needs root on Debian or Ubuntu.
#
#     docker/try_cpu_image.sh [options of `buildah build`: --volume, --build-arg ...]
set -euo pipefail
cd "$(dirname "$0")/.."
[ "$(id -u)" = 0 ] || { echo "NOT RUN: building in a chroot needs root"; exit 0; }
if ! type -P debootstrap buildah > /dev/null; then
  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends debootstrap buildah; } > /dev/null \
    || { echo "NOT RUN: apt-get could not install debootstrap and buildah"; exit 0; }
fi
scratch=$(mktemp -d -t image-XXXXXX)
trap 'rm -rf "$scratch"' EXIT

images() {
  buildah --storage-driver vfs --root "$scratch/images" --runroot "$scratch/run" "$@"
}

debootstrap --variant=minbase bookworm "$scratch/debian" > "$scratch/debootstrap.log" || { tail "$scratch/debootstrap.log"; exit 1; }
base=$(images from scratch)
images add --quiet "$base" "$scratch/debian" / > /dev/null
images commit --quiet --rm "$base" docker.io/library/debian:bookworm-slim > /dev/null
rm -rf "$scratch/debian"
images build --isolation chroot --network host --pull-never --format docker "$@" --file docker/Dockerfile.cpu --tag moe_train:cpu .

box=$(images from --pull-never localhost/moe_train:cpu)
inside() { # by a name that can be looked up, as engines see to
  images run --isolation chroot --network host --hostname localhost "$box" -- "$@"
}
of_image() { # a part of the image's configuration, a line for each of its words
  images inspect --type image --format "{{range .Docker.Config.$1}}{{println .}}{{end}}" localhost/moe_train:cpu | sed '/^$/d'
}
entrypoint=$(of_image Entrypoint)
mapfile -t health < <(of_image Healthcheck.Test | tail -n +2)
inside "${health[@]}"
echo "healthy, as $(inside id -un)"
unpinned=$(comm -23 <(inside pip freeze --exclude-editable --exclude torch | sort) <(sort docker/pins.txt))
[ -z "$unpinned" ] || { printf 'not in docker/pins.txt:\n%s\n' "$unpinned"; exit 1; }
inside "$entrypoint" python launch/prepare_data.py --default-corpus data/stdlib --train-sentencepiece 1024
inside "$entrypoint" --nproc-per-node=2 launch/pretrain.py configs/quickstart.yaml \
  train.steps=6 train.log_every=1 optim.warmup_steps=2 eval.every=3 eval.max_rows=8 sample.max_tokens=8
inside ls runs/quickstart/checkpoints/step-00000006/manifest.json
