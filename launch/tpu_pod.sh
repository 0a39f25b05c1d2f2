#!/bin/bash
# One lfjax run on all workers of a Cloud TPU slice: created if it is missing, this commit installed, the command run on
# every worker, its output in logs/NAME.log.
#
#   launch/tpu_pod.sh [--dry-run] NAME ZONE TYPE COMMAND...
#   launch/tpu_pod.sh trainer us-east5-a v5p-64 lfjax train --config=configs/x.py --workdir=gs://bucket/runs/x
#
# TYPE is Cloud's name (v5p-64 has 32 chips). --dry-run prints the commands. Optional: TPU_RUNTIME, the image; TPU_FLAGS,
# more flags for creation ("--spot --network=lfjax"). The slice is not deleted, the last line says how. A run that was
# preempted goes on when the same line is run again. Needs gcloud with a project set, and git.
set -euo pipefail

dry_run=
if [ "${1:-}" = --dry-run ]; then
  dry_run=1
  shift
fi
if [ $# -lt 4 ]; then
  sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
name=$1 zone=$2 type=$3
shift 3
case $type in
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v5litepod-* | v5e-*) runtime=v2-alpha-tpuv5-lite ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  *) runtime='tpu-ubuntu2204-base' ;;
esac
read -r -a flags <<<"${TPU_FLAGS:-}"
tpu=(gcloud compute tpus tpu-vm)

run() {
  if [ -n "$dry_run" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
on_workers() { run "${tpu[@]}" ssh "$name" --zone="$zone" --worker=all --command="$1"; }

if [ -n "$dry_run" ] || ! "${tpu[@]}" describe "$name" --zone="$zone" >/dev/null 2>&1; then
  run "${tpu[@]}" create "$name" --zone="$zone" --accelerator-type="$type" \
    --version="${TPU_RUNTIME:-$runtime}" ${flags[@]+"${flags[@]}"}
fi

archive=$(mktemp -d)/lfjax.tar.gz
trap 'rm -rf "$(dirname "$archive")"' EXIT
run git archive --format=tar.gz --output="$archive" HEAD
run "${tpu[@]}" scp "$archive" "$name":lfjax.tar.gz --zone="$zone" --worker=all
# shellcheck disable=SC2016  # single quotes: evaluated on the workers
on_workers 'set -e; mkdir -p lfjax; tar -xzf lfjax.tar.gz -C lfjax; python3 -m pip install -q --user uv
PATH=$HOME/.local/bin:$PATH; cd lfjax; [ -d .venv ] || uv venv -q --python 3.12; uv pip install -q -e ".[tpu]"'

# The slice's metadata say who this worker is and where worker 0 listens.
# shellcheck disable=SC2016
identity='attribute() { curl -sf -H Metadata-Flavor:Google http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1; }
endpoints=$(attribute worker-network-endpoints); LFJAX_PROCESS_ID=$(attribute agent-worker-number)
LFJAX_COORDINATOR=$(echo "$endpoints" | cut -d, -f1 | sed "s/.*://"):8476
LFJAX_NUM_PROCESSES=$(echo "$endpoints" | tr , "\n" | wc -l)
export LFJAX_PROCESS_ID LFJAX_COORDINATOR LFJAX_NUM_PROCESSES'
log=${dry_run:+/dev/null}
log=${log:-logs/$name.log}
mkdir -p "$(dirname "$log")"
status=0
on_workers "set -e; $identity; cd lfjax; PATH=\$PWD/.venv/bin:\$PATH exec $(printf '%q ' "$@")" 2>&1 | tee -a "$log" || status=$?
echo "log: logs/$name.log; delete the slice: ${tpu[*]} delete $name --zone=$zone"
exit $status
