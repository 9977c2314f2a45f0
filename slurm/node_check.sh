# shellcheck shell=bash
# Checks one node before training: the last line is OK or the reason why the node is unfit.
#
#   bash -c "$(<node_check.sh)" node_check LOGS TOKEN COMMAND CHECK
logs=$1 token=$2 command=$3 check=$4
bad() {
  echo "$*"
  exit
}
free() { df -Pm "$1" | awk 'NR == 2 {print $4}'; }
least=${D2V_MIN_FREE_MB:-2000} scratch=${TMPDIR:-/tmp}

[[ $(cat "$logs/token" 2>/dev/null) == "$token" ]] || bad "cannot see $logs/token: the run folder is not shared with this node"
for folder in "$logs" "$scratch" /dev/shm; do
  file=$folder/.d2v.$SLURM_JOB_ID.$SLURMD_NODENAME
  { echo 1 >"$file" && rm "$file"; } 2>/dev/null || bad "cannot write to $folder"
done
for folder in "$logs" "$scratch"; do
  (($(free "$folder") >= least)) || bad "$folder has $(free "$folder") MB free, D2V_MIN_FREE_MB requires $least"
done
if [[ $command ]]; then command -v "$command" >/dev/null || bad "$command: not found"; fi
if [[ ${SLURM_GPUS_ON_NODE:-} ]] && command -v nvidia-smi >/dev/null; then
  found=$(timeout 15 nvidia-smi -L | grep -c '^GPU')
  ((found >= SLURM_GPUS_ON_NODE)) || bad "nvidia-smi lists $found GPUs, the job has $SLURM_GPUS_ON_NODE on this node"
fi
if [[ $check ]]; then
  said=$(timeout 20 bash -c "$check" 2>&1) || bad "NODE_CHECK failed: ${said:-no output}"
  [[ -z $said ]] || bad "NODE_CHECK reports: $said"
fi
echo OK
