#!/bin/bash
# One lfjax run on all workers of a Cloud TPU slice: created if it is missing, this commit installed, the command run on
# every worker. A preempted slice is deleted and created again, and the run goes on. docs/cloud.md has all steps.
#
#   launch/tpu_pod.sh [--dry-run] NAME ZONE SIZE COMMAND...
#   launch/tpu_pod.sh trainer us-east5-a v5p:4x4x4 lfjax train --config=configs/x.py --workdir=/mnt/lfjax/x
#
# SIZE is generation:topology (v5p:4x4x4, 64 chips) or Cloud's own name (v5p-128, which counts cores). The workdir is a
# folder that all workers see. Output goes to logs/NAME/TIME-ATTEMPT/: live.log, and K.log of worker K. A run outlives
# Ctrl-C here and lost connections; the same line again watches it. Exit code: the command's. Optional: TPU_FLAGS, more
# flags for creation ("--spot"); TPU_SETUP, shell commands for every worker, before the run (a mount); TPU_RUNTIME, the
# image; TPU_RESTARTS, how often it goes on after a loss (10); TPU_WAITS, how often it looks for a slice to come (120).
set -euo pipefail

dry_run=
[ "${1:-}" != --dry-run ] || { dry_run=1 && shift; }
[ $# -ge 4 ] || { sed -n '2,13s/^# \{0,1\}//p' "$0" >&2 && exit 2; }
name=$1 zone=$2 size=$3
shift 3
for word; do
  [[ $word =~ ^(--workdir=)?gs:// ]] || continue
  echo "error: $word: lfjax writes to folders; mount the bucket on the workers (TPU_SETUP, see docs/cloud.md)" >&2
  exit 2
done
case $size in
  v5p*) runtime='v2-alpha-tpuv5' ;;
  v5litepod* | v5e*) runtime='v2-alpha-tpuv5-lite' ;;
  v6e*) runtime='v2-alpha-tpuv6e' ;;
  *) runtime='tpu-ubuntu2204-base' ;;
esac
size=${size/#v5e/v5litepod}
case $size in *:*) shape=(--type="${size%%:*}" --topology="${size#*:}") ;; *) shape=(--accelerator-type="$size") ;; esac
read -r -a flags <<<"${TPU_FLAGS:-}"
tpu=(gcloud compute tpus tpu-vm)
describe=("${tpu[@]}" describe "$name" --zone="$zone" '--format=value(state)')

run() { if [ -n "$dry_run" ]; then printf '%q ' "$@" && echo; else "$@"; fi; }
on_workers() { run "${tpu[@]}" ssh "$name" --zone="$zone" --worker=all --batch-size=all "$@"; }
state() { # nothing where there is no slice; any other error of gcloud's ends the launcher
  if [ -n "$dry_run" ]; then return
  elif said=$("${describe[@]}" 2>&1); then grep -xE '[A-Z_]+' <<<"$said" || echo UNKNOWN
  elif [[ $said != *NOT_FOUND* ]]; then echo "$said" >&2 && return 1; fi
}
# shellcheck disable=SC2016  # evaluated on the workers; lfjax.lock is held by a run that goes on
install='set -e; flock -n lfjax.lock true || exit 0; '${TPU_SETUP:-true}'
mkdir -p lfjax; tar -xzf lfjax.tar.gz -C lfjax; python3 -m pip install -q --user uv
PATH=$HOME/.local/bin:$PATH; cd lfjax; [ -d .venv ] || uv venv -q --python 3.12; uv pip install -q -e ".[tpu]"'

quoted=$(printf '%q ' "$@") attempt=0 waits=0
stamp=$(date +%Y%m%d-%H%M%S)
while :; do
  attempt=$((attempt + 1)) status=0
  folder=logs/$name/$stamp-$attempt found=$(state)
  [ -z "$dry_run" ] || run "${describe[@]}"
  case $found in
    READY) waits=0 ;;
    '' | PREEMPTED | TERMINATED)
      [ -z "$found" ] || run "${tpu[@]}" delete "$name" --zone="$zone" --quiet
      run "${tpu[@]}" create "$name" --zone="$zone" "${shape[@]}" --version="${TPU_RUNTIME:-$runtime}" \
        ${flags[@]+"${flags[@]}"} ;;
    STOPPED | STOPPING | CREATING | STARTING | RESTARTING | REIMAGING | REPAIRING | DELETING | UNHIDING)
      echo "$name is $found: waiting for READY; to give up: ${tpu[*]} delete $name --zone=$zone" >&2
      [ $((waits += 1)) -le "${TPU_WAITS:-120}" ] || { echo "error: $name is still $found: waited too long" >&2 && exit 1; }
      if [ "$found" = STOPPED ]; then "${tpu[@]}" start "$name" --zone="$zone"; else sleep "${TPU_WAIT:-30}"; fi
      attempt=$((attempt - 1)) && continue ;;
    *) echo "error: $name is $found, which is not known to become READY; look at it, or take another NAME" >&2 && exit 1 ;;
  esac
  run mkdir -p "$folder"
  run git -C "$(dirname "$0")/.." archive --format=tar.gz --output="$PWD/$folder/lfjax.tar.gz" HEAD
  { run "${tpu[@]}" scp "$folder/lfjax.tar.gz" "$name":lfjax.tar.gz --zone="$zone" --worker=all &&
    on_workers --command="$install" &&
    on_workers --command="bash lfjax/launch/tpu_worker.sh $stamp-$attempt $quoted"; } 2>&1 |
    if [ -n "$dry_run" ]; then cat; else tee -a "$folder/live.log"; fi || status=$?
  on_workers --output-directory="$folder" --command='cat lfjax.log' || echo "no worker logs: $name cannot be reached" >&2
  [ $status != 0 ] || break
  sleep "${TPU_WAIT:-30}" # for the state to follow
  found=$(state)
  if [ "$found" = READY ] && [ $status != 255 ] || [ $attempt -gt "${TPU_RESTARTS:-10}" ]; then break; fi
  echo "$name is ${found:-gone}, exit code $status: going on" >&2
done
echo "logs: logs/$name; when done, delete the slice: ${tpu[*]} delete $name --zone=$zone"
exit "$status"
