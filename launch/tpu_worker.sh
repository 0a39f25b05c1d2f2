#!/bin/bash
# Runs on one worker of a Cloud TPU slice, from its home folder, called by tpu_pod.sh: starts the command, or watches
# the run that goes on, and ends with the run's exit code (255: it left none).
#
#   launch/tpu_worker.sh ID COMMAND...
#
# The same ID never starts twice: gcloud repeats a command whose connection was lost. While a run goes on, another
# command is refused (exit code 2). The slice's metadata say who this worker is and where worker 0 is. In the home
# folder: lfjax.lock (held by the run), lfjax.command, lfjax.log, lfjax.exit, lfjax.id.
set -euo pipefail

if [ $# -lt 2 ]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
id=$1
shift
attribute() {
  curl -sf --retry 6 -H Metadata-Flavor:Google "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}
endpoints=$(attribute worker-network-endpoints) # name:id:ip,... or ip,...
LFJAX_PROCESS_ID=$(attribute agent-worker-number)
LFJAX_COORDINATOR=$(echo "$endpoints" | cut -d, -f1 | sed 's/.*://'):8482 # jax's own port for it
LFJAX_NUM_PROCESSES=$(echo "$endpoints" | tr , '\n' | wc -l)
export LFJAX_PROCESS_ID LFJAX_COORDINATOR LFJAX_NUM_PROCESSES PATH="$HOME/lfjax/.venv/bin:$PATH"

cd
touch lfjax.id lfjax.command
command=$(printf '%q ' "$@")
exec 9>lfjax.lock
if [ "$(cat lfjax.id)" != "$id" ] && flock -n 9; then
  rm -f lfjax.exit
  : >lfjax.log
  echo "$command" >lfjax.command
  echo "$id" >lfjax.id
  # shellcheck disable=SC2016  # by the inner shell, which inherits the lock and outlives this one
  (cd lfjax && setsid nohup bash -c '"$@"; echo $? >~/lfjax.exit' lfjax "$@" </dev/null >~/lfjax.log 2>&1 &)
elif [ "$(cat lfjax.command)" != "$command" ]; then
  echo "error: a run of another command is going on: $(cat lfjax.command); stop it first (docs/cloud.md)" >&2
  exit 2
fi
exec 9>&-
flock -s lfjax.lock true & # until the run has ended
tail -n +1 -F --pid=$! lfjax.log
exit "$(cat lfjax.exit || echo 255)"
