#!/usr/bin/env bash
# Deletes a pod, and with it what it costs; tries a few times, and says if it is still there.
#   tpu/delete.sh --zone=us-west4-a
#     --name, --zone, --project, --dry-run
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"
common_flags "$@"
((${#REST[@]} == 0)) || die "${REST[0]}: one of --name --zone --project --dry-run"

delete() {
  case $(state ACTIVE) in
    NONE) echo "there is no $NAME" ;;
    UNKNOWN) echo "whether there is a $NAME could not be asked" >&2; return 1 ;;
    READY | PREEMPTED | TERMINATED | STOPPED) tpus tpu-vm delete "$NAME" --quiet ;;
    *) tpus queued-resources delete "$NAME" --force --quiet ;;
  esac
}

for try in 1 2 3 4; do
  ((try == 1)) || wait_a_little
  ! delete || exit 0
done
die "$NAME was NOT deleted and still costs: tpu/delete.sh --name=$NAME" ${WHERE[@]+"${WHERE[@]}"}
