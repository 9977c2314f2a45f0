#!/bin/bash
# Submits a chain of jobs. Each stage starts when the previous one has succeeded.
#
#   slurm/pipeline.sh [--dry-run] STAGE [then STAGE ...]
#
# STAGE is [--sbatch-option=value ...] NAME ARGUMENTS. NAME is a script of this folder without
# .sbatch (convert, pretrain, finetune, evaluate ...) or any other command, which runs on one node.
# After a `convert` with --array its merge is submitted, too. --dry-run prints the jobs without
# submitting. Example:
#
#   slurm/pipeline.sh \
#     --array=0-7 convert speech /corpora/librispeech /shards/librispeech \
#     then --nodes=1 pretrain speech_base data.shards=/shards/librispeech \
#     then finetune ctc_vox_100h_3 init=runs/speech_base data.shards=/shards/100h \
#     then evaluate wer runs/ctc_vox_100h_3 --test /shards/test_clean /shards/test_other
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
usage() { sed -n '2,16s/^# \{0,1\}//p' "$0"; }
wrong() {
  echo "pipeline.sh: $*" >&2
  exit 2
}

dry='' jobs=() previous=''

submit() { # sbatch's options, script, arguments
  local command=(sbatch --parsable --kill-on-invalid-dep=yes)
  if [[ $previous ]]; then command+=("--dependency=afterok:$previous"); fi
  command+=("$@")
  if [[ $dry ]]; then
    printf '%q ' "${command[@]}"
    echo
    previous="JOB$((${#jobs[@]} + 1))"
  else
    previous=$("${command[@]}") || {
      if ((${#jobs[@]})); then scancel "${jobs[@]}"; fi
      echo "pipeline.sh: sbatch refused a stage; the earlier stages were cancelled" >&2
      exit 1
    }
    previous=${previous%%;*}
    echo "$previous: ${*#"$here/"}"
  fi
  jobs+=("$previous")
}

stage() { # [options] NAME arguments
  local options=() array='' name
  while [[ ${1:-} == -* ]]; do
    if [[ $1 == --array=* || $1 == -a* ]]; then array=yes; fi
    options+=("$1")
    shift
  done
  name=${1:-}
  [[ $name ]] || wrong "a stage needs a name: convert, pretrain, finetune, evaluate, or a command"
  if [[ -e $here/$name.sbatch ]]; then
    submit "${options[@]}" "$here/$name.sbatch" "${@:2}"
  else
    submit "${options[@]}" "$here/run.sbatch" "$@"
  fi
  if [[ $name == convert && $array ]]; then
    [[ ${4:-} && ${4:0:1} != - ]] || wrong "convert: give FAMILY SOURCE OUT before the options"
    submit "$here/convert.sbatch" merge "$4"
  fi
}

case ${1:-} in
  -h | --help) usage; exit 0 ;;
  "") usage >&2; exit 2 ;;
  --dry-run) dry=yes; shift ;;
esac
# Inside a job, as under salloc, the variables of that job would affect the new ones.
while read -r name; do unset "$name"; done < <(compgen -e | grep -E '^(SLURM|SRUN)_' | grep -vx SLURM_CONF)
settings=${D2V_CLUSTER_ENV:-$here/cluster.env}
# shellcheck source=/dev/null
if [[ -e $settings ]]; then . "$settings"; fi

words=()
for word; do
  if [[ $word == "then" ]]; then
    stage "${words[@]}"
    words=()
  else
    words+=("$word")
  fi
done
stage "${words[@]}"
