#!/usr/bin/env bash
# Deletes a pod, and with it what it costs.
#   tpu/delete.sh --zone=us-west4-a
#     --name, --zone, --project, --dry-run
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"
common_flags "$@"
((${#REST[@]} == 0)) || die "${REST[0]}: one of --name --zone --project --dry-run"

case $(state ACTIVE) in
  NONE) echo "there is no $NAME" ;;
  UNKNOWN) die "whether there is a $NAME could not be asked; it may still cost" ;;
  READY | PREEMPTED | TERMINATED | STOPPED) tpus tpu-vm delete "$NAME" --quiet ;;
  *) tpus queued-resources delete "$NAME" --force --quiet ;;
esac
