#!/usr/bin/env bash
# Copies the checkout's newest commit to every host of a pod and installs the lock there.
#   tpu/setup.sh --zone=us-west4-a [--bucket=NAME]
#     --bucket=NAME  mounted as ~/bucket on every host: hosts need a workdir that they share
#     --name, --zone, --project, --dry-run
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"
common_flags "$@"

BUCKET=''
for flag in ${REST[@]+"${REST[@]}"}; do
  case $flag in
    --bucket=*) BUCKET=${flag#*=} ;;
    *) die "$flag: one of --bucket --name --zone --project --dry-run" ;;
  esac
done
[[ $BUCKET =~ ^[a-z0-9._-]*$ ]] || die "--bucket=$BUCKET: the bucket's name alone, without gs://"

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
git -C "$HERE/.." archive --format=tar.gz -o "$folder/lmjax.tar.gz" HEAD
tpus tpu-vm scp "$folder/lmjax.tar.gz" "$NAME:lmjax.tar.gz" --worker=all
# The images have Python 3.10; uv brings a newer one, and the lock is the laptop's and libtpu.
# shellcheck disable=SC2016
on_hosts all 'set -e; mkdir -p lmjax; tar -xzf lmjax.tar.gz -C lmjax; cd lmjax
python3 -m pip install --user --quiet uv; ~/.local/bin/uv python install --quiet 3.12
make setup-tpu PYTHON="$(~/.local/bin/uv python find 3.12)"'
if [[ -n $BUCKET ]]; then
  on_hosts all "set -e; mkdir -p bucket; command -v gcsfuse >/dev/null || {
sudo apt-get -qq update; sudo apt-get -qq install -y gcsfuse; }
mountpoint -q bucket || gcsfuse --implicit-dirs $BUCKET bucket"
fi
