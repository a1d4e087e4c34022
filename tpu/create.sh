#!/usr/bin/env bash
# Asks for a TPU pod and waits until it is there.
#   tpu/create.sh --type=v5litepod-16 --zone=us-west4-a --hours=12 [--spot] [--on-demand]
#     --type=TYPE   accelerator, as Google names it: v5litepod-16, v5p-32, v6e-16, v4-32
#     --hours=N     the pod deletes itself N hours after it was made, whatever runs
#     --spot        cheaper, and may be taken away;  --on-demand  without the queue
#     --version=V   runtime (default: the type's)
#     --name, --zone, --project, --dry-run
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"
common_flags "$@"

TYPE='' HOURS='' VERSION='' SPOT=() QUEUED=1
for flag in ${REST[@]+"${REST[@]}"}; do
  case $flag in
    --type=*) TYPE=${flag#*=} ;;
    --hours=*) HOURS=${flag#*=} ;;
    --version=*) VERSION=${flag#*=} ;;
    --spot) SPOT=(--spot) ;;
    --on-demand) QUEUED=0 ;;
    *) die "$flag: one of --type --hours --version --spot --on-demand --name --zone --project --dry-run" ;;
  esac
done
[[ -n $TYPE ]] || die "--type=TYPE is needed, as v5litepod-16"
[[ $HOURS =~ ^[0-9]*\.?[0-9]+$ ]] || die "--hours=N is needed: the pod deletes itself after so long"
case ${VERSION:-$TYPE} in
  v5litepod-*) VERSION=v2-alpha-tpuv5-lite ;;
  v5p-*) VERSION=v2-alpha-tpuv5 ;;
  v6e-*) VERSION=v2-alpha-tpuv6e ;;
  v4-*) VERSION=tpu-ubuntu2204-base ;;
  "$TYPE") die "--type=$TYPE: no runtime is known for it; name one by --version=" ;;
esac

case $(state NONE) in
  ACTIVE | READY) echo "$NAME is there already"; exit 0 ;;
  NONE) ;;
  UNKNOWN) die "whether there is a $NAME could not be asked" ;;
  SUSPEND* | FAILED | PREEMPTED) die "$NAME is left over: tpu/delete.sh --name=$NAME" ;;
esac

seconds=$(awk -v h="$HOURS" 'BEGIN { printf "%d", h * 3600 }')
((seconds >= 60)) || die "--hours=$HOURS: no pod is made for less than a minute"
cap=$(mktemp)
trap 'rm -f "$cap"' EXIT
kind=tpu-vm force=''
if ((QUEUED)); then kind=queued-resources force=--force; fi
echo "systemd-run --on-active=$seconds gcloud compute tpus $kind delete $NAME $force ${WHERE[*]-} --quiet --async" >"$cap"
made=("--accelerator-type=$TYPE" "--metadata-from-file=startup-script=$cap" --scopes=cloud-platform)
if ((QUEUED)); then made+=("--node-id=$NAME" "--runtime-version=$VERSION"); else made+=("--version=$VERSION"); fi
tpus "$kind" create "$NAME" "${made[@]}" ${SPOT[@]+"${SPOT[@]}"}
until now=$(state ACTIVE); [[ $now =~ ^(ACTIVE|READY)$ ]]; do
  [[ ! $now =~ ^(FAILED|SUSPENDED|NONE)$ ]] || die "$NAME was not given: $now"
  wait_a_little
done
echo "$NAME is there; it deletes itself in $HOURS hours"
