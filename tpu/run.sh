#!/usr/bin/env bash
# Runs a command of lmjax on all hosts of a pod until it is done; after a preemption it makes the
# pod again and goes on. What the pod is, as for create.sh and setup.sh:
#   tpu/run.sh --type=v5litepod-16 --zone=us-west4-a --hours=12 --spot --bucket=mine \
#     -- train experiments/gpt2_small.py --workdir=../bucket/gpt2
#     --hours=N  in all, over preemptions;  --keep  leave the pod when the command is done
#     --name, --zone, --project, --dry-run; the exit code is the command's
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"
common_flags "$@"

MADE=() SETUP=() HOURS='' KEEP=0 THERE=0 FAILED=0 COMMAND=()
while ((${#REST[@]})); do
  case ${REST[0]} in
    --hours=*) HOURS=${REST[0]#*=} ;;
    --bucket=*) SETUP=("${REST[0]}") ;;
    --type=* | --version=* | --spot | --on-demand) MADE+=("${REST[0]}") ;;
    --keep) KEEP=1 ;;
    --) COMMAND=("${REST[@]:1}"); break ;;
    *) die "${REST[0]}: one of --type --hours --version --spot --on-demand --bucket --keep, then -- VERB …" ;;
  esac
  REST=("${REST[@]:1}")
done
((${#COMMAND[@]})) || die "what to run is missing: -- train experiments/…"
[[ $HOURS =~ ^[0-9]*\.?[0-9]+$ ]] || die "--hours=N is needed: nothing is paid for longer"
# A pod takes minutes to make: four polls at the least.
worth_it() { awk -v h="$1" -v poll="${LMJAX_POLL:-45}" 'BEGIN { exit h * 3600 < 4 * poll }'; }
worth_it "$HOURS" || die "--hours=$HOURS: over before a pod is there"
SAME=(); while IFS= read -r flag; do SAME+=("$flag"); done < <(same)
deadline=$(awk -v h="$HOURS" -v now="$(date +%s)" 'BEGIN { printf "%d", now + h * 3600 }')
line=$(printf '%q ' "${COMMAND[@]}")
# Detached, so that it does not end with the connection; a run that is there is only waited for.
start="cd lmjax; if ! kill -0 \$(cat run.pid 2>/dev/null) 2>/dev/null; then rm -f run.exit
nohup bash -c '.venv/bin/python -m lmjax ${line//\'/\'\\\'\'}; echo \$? >run.exit' >>run.log 2>&1 & echo \$! >run.pid; fi"

while :; do
  left=$(awk -v end="$deadline" -v now="$(date +%s)" 'BEGIN { printf "%.4f", (end - now) / 3600 }')
  worth_it "$left" || { "$HERE/delete.sh" "${SAME[@]}" || true; die "$HOURS hours are over"; }
  # What is wrong from the start ends it; after a preemption there may be no room for a while.
  "$HERE/create.sh" "${SAME[@]}" "--hours=$left" ${MADE[@]+"${MADE[@]}"} || {
    code=$?; ((THERE)) || exit "$code"
    "$HERE/delete.sh" "${SAME[@]}" || true; wait_a_little; continue; }
  THERE=1
  { "$HERE/setup.sh" "${SAME[@]}" ${SETUP[@]+"${SETUP[@]}"} && on_hosts all "$start"; } || {
    ((++FAILED < 3)) || { "$HERE/delete.sh" "${SAME[@]}" || true; die "$NAME could not be set up"; }
    wait_a_little; continue; }
  FAILED=0
  while [[ $(state ACTIVE) =~ ^(ACTIVE|READY|UNKNOWN)$ ]] && (($(date +%s) < deadline)); do
    code=$(on_hosts 0 'cat lmjax/run.exit 2>/dev/null || true' || true)
    if ((DRY)) || [[ $code =~ ^[0-9]+$ ]]; then
      tpus tpu-vm scp "$NAME:lmjax/run.log" "$NAME.log" --worker=0 || true
      ((KEEP)) || "$HERE/delete.sh" "${SAME[@]}" || ((code)) || code=2
      exit "${code:-0}"
    fi
    wait_a_little
  done
  "$HERE/delete.sh" "${SAME[@]}" || true
done
