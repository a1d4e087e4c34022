# shellcheck shell=bash
# Sourced by the other scripts: the flags that all of them have, and how they call gcloud.
#   --name=NAME   of the pod (default lmjax)     --zone=ZONE     (default: gcloud's own)
#   --project=ID  (default: gcloud's own)        --dry-run       print what would be called
set -euo pipefail

NAME=lmjax DRY=0 WHERE=() REST=()
# shellcheck disable=SC2034  # read by the scripts
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

wait_a_little() { sleep "${LMJAX_POLL:-45}"; }
die() { echo "error: $*" >&2; exit 2; }
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0; }

# Takes the common flags out of the arguments; the others are left in REST.
common_flags() {
  while (($#)); do
    case $1 in
      --name=*) NAME=${1#*=} ;;
      --zone=*) WHERE+=("--zone=${1#*=}") ;;
      --project=*) WHERE+=("--project=${1#*=}") ;;
      --dry-run) DRY=1 ;;
      --help | -h) usage ;;
      --) REST+=("$@"); break ;;
      *) REST+=("$1") ;;
    esac
    shift
  done
  [[ $NAME =~ ^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$ ]] || die "--name=$NAME: small letters, digits and -"
  ((DRY)) || command -v gcloud >/dev/null || die "no gcloud on PATH: https://cloud.google.com/sdk/docs/install"
}

# The common flags again, for another script.
same() {
  printf '%s\n' "--name=$NAME" ${WHERE[@]+"${WHERE[@]}"}
  if ((DRY)); then echo --dry-run; fi
}

call() {
  echo "+ $*" >&2
  ((DRY)) || "$@"
}

tpus() { call gcloud compute tpus "$1" "$2" "${@:3}" ${WHERE[@]+"${WHERE[@]}"}; }

# ACTIVE, SUSPENDED … of a queued pod, READY, PREEMPTED … of another one; NONE of none; UNKNOWN
# where gcloud could not ask, as without a network: that is no reason to make or delete anything.
state() {
  if ((DRY)); then echo "$1"; return; fi
  local kind said
  for kind in queued-resources/state.state tpu-vm/state; do
    said=$(gcloud compute tpus "${kind%/*}" describe "$NAME" ${WHERE[@]+"${WHERE[@]}"} \
      --format="value(${kind#*/})" 2>&1) && { echo "${said##*$'\n'}"; return; }
    [[ $said == *NOT_FOUND* ]] || { echo "$said" >&2; echo UNKNOWN; return; }
  done
  echo NONE
}

on_hosts() { tpus tpu-vm ssh "$NAME" "--worker=$1" "--command=$2"; }
