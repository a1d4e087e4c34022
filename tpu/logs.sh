#!/usr/bin/env bash
# Streams the output of host 0.
#   tpu/logs.sh --zone=us-west4-a
#     --name, --zone, --project, --dry-run
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"
common_flags "$@"
((${#REST[@]} == 0)) || die "${REST[0]}: one of --name --zone --project --dry-run"
on_hosts 0 'tail -n 200 -F lmjax/run.log'
