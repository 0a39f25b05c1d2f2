#!/bin/bash
# One lfjax run as a JobSet on GKE, on a TPU slice (tpu.yaml) or GPU nodes (gpu.yaml). docs/cloud.md has all steps.
#
#   launch/gke/run.sh [--dry-run] SIZE NAME IMAGE CONFIG WORKDIR [--config.key=value ...]
#   launch/gke/run.sh v5p:4x4x4 trainer IMAGE configs/x.py /mnt/lfjax/x
#
# SIZE is generation:topology of a TPU slice (v5p:4x4x4, 64 chips; v4, v5e, v5p, v6e) or GPU:nodes x GPUs of each
# (h100:2x8). CONFIG is a path in the image, WORKDIR a folder under /mnt/lfjax, where the volume claim LFJAX_CLAIM
# ("lfjax") is mounted; all nodes write to it. --dry-run prints the command with the filled-in JobSet. Needs kubectl.
set -euo pipefail

usage() {
  if [ $# -gt 0 ]; then echo "error: $1" >&2; else sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; fi
  exit 2
}
dry_run=
[ "${1:-}" != --dry-run ] || { dry_run=1 && shift; }
[ $# -ge 5 ] || usage
size=$1 name=$2 image=$3 config=$4 workdir=$5
shift 5
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || usage "NAME $name: small letters, digits and -, at most 40"
[[ $workdir == /mnt/lfjax/?* && /$workdir/ != */../* ]] || usage "WORKDIR $workdir: must be under /mnt/lfjax, the volume that all nodes see"
[[ $image =~ ^[A-Za-z0-9][A-Za-z0-9._:/@-]*$ ]] || usage "IMAGE $image: a name such as registry/project/lfjax:1"
claim=${LFJAX_CLAIM:-lfjax}
[[ $claim =~ ^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$ ]] || usage "LFJAX_CLAIM $(printf %q "$claim"): small letters, digits, - and ."
topology=${size#*:}
case ${size%%:*} in
  v4) accelerator=tpu-v4-podslice ;;
  v5p) accelerator=tpu-v5p-slice ;;
  v5e) accelerator=tpu-v5-lite-podslice ;;
  v6e) accelerator=tpu-v6e-slice ;;
  a100) accelerator=nvidia-tesla-a100 ;;
  a100-80gb) accelerator=nvidia-a100-80gb ;;
  h100) accelerator=nvidia-h100-80gb ;;
  h200) accelerator=nvidia-h200-141gb ;;
  l4 | b200 | nvidia-*) accelerator=nvidia-${size%%:*} && accelerator=${accelerator/nvidia-nvidia/nvidia} ;;
  *) usage "SIZE $size: not a TPU (v4, v5e, v5p, v6e) or GPU (a100, a100-80gb, h100, h200, b200, l4, nvidia-...)" ;;
esac
[[ $accelerator =~ ^[a-z0-9-]+$ ]] || usage "SIZE $(printf %q "$size"): small letters, digits and - before the colon"
slice_exists() {
  case $accelerator in
    tpu-v4-* | tpu-v5p-*)
      [[ $topology =~ ^[1-9][0-9]{0,2}(x[1-9][0-9]{0,2}){2}$ ]] || return
      for side in ${topology//x/ }; do [ "$side" -le 2 ] || [ $((side % 4)) = 0 ] || return; done
      [ $((${topology//x/*} % 4)) = 0 ] ;;
    *) [[ $topology =~ ^(1x1|2x2|2x4|4x4|4x8|8x8|8x16|16x16)$ ]] ;;
  esac
}
case $accelerator in
  tpu-*) # four chips a host; a slice of fewer is one host
    sides="of v4 and v5p three sides, each 1, 2 or a multiple of 4; of v5e and v6e 1x1, 2x2, 2x4 ... 16x16"
    slice_exists || usage "SIZE $size: no such slice; write the topology, such as v5p:4x4x4: $sides"
    template=tpu.yaml chips=$((${topology//x/*}))
    nodes=$(((chips + 3) / 4)) per_node=$((chips < 4 ? chips : 4)) ;;
  *)
    [[ $topology =~ ^[1-9][0-9]*x[1-9][0-9]*$ ]] || usage "SIZE $size: write nodes x GPUs of each, such as h100:2x8"
    template=gpu.yaml nodes=${topology%x*} per_node=${topology#*x} ;;
esac

command=
for word in lfjax train "--config=$config" "--workdir=$workdir" "$@"; do
  word=${word//\\/\\\\} && word=${word//\"/\\\"} && word=${word//\$(/\$\$(} # JSON's quotes; $(...) would be Kubernetes'
  word=${word//$'\n'/\\n} && word=${word//$'\t'/\\t} && word=${word//$'\r'/\\r}
  [[ $word != *[[:cntrl:]]* ]] || usage "ARGUMENT $(printf %q "$word"): holds a control character"
  command+="${command:+, }\"$word\""
done
jobset=$(<"$(dirname "$0")/$template")
fill() { jobset=${jobset//"\${$1}"/"$2"}; }
fill NAME "$name" && fill IMAGE "$image" && fill ACCELERATOR "$accelerator" && fill TOPOLOGY "$topology"
fill NODES "$nodes" && fill PER_NODE "$per_node" && fill DEVICES "\"$(seq -s, 0 $((per_node - 1)))\""
fill CLAIM "$claim" && fill COMMAND "[$command]"
if [ -n "$dry_run" ]; then
  printf "kubectl create -f - <<'EOF'\n%s\nEOF\n" "$jobset"
else
  kubectl create -f - <<<"$jobset"
fi
pods=jobset.sigs.k8s.io/jobset-name=$name
echo "# logs: kubectl logs -f --prefix --tail=-1 --max-log-requests=$nodes --selector=$pods"
echo "# state: kubectl get jobset $name; stop, or make room for the same name: kubectl delete jobset $name"
