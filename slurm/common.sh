# shellcheck shell=bash
# What the batch scripts share: the cluster's settings, and ranks that are checked, watched,
# stopped, requeued. A script says where it lies and what to run:
#
#   here=FOLDER; . "$here/common.sh"; run_ranks d2v-ds train "$@"
#
# Asked of the command that run_ranks runs: with --check it prints the run's folder and ends; it
# writes RUN/heartbeat/rankNNNNN.json now and then, RUN/checkpoints/STEP, and RUN/DONE or
# RUN/STOPPED at its end; it stops when the file D2V_JOB_LOGS/stop appears, on USR2 and on TERM.

LAUNCH=() SRUN_OPTIONS=() NODE_CHECK=
settings=${D2V_CLUSTER_ENV:-$here/cluster.env}
# shellcheck source=/dev/null
if [[ -e $settings ]]; then . "$settings"; fi

unset SLURM_EXPORT_ENV # else `sbatch --export=NONE` empties the ranks' environment too
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take sbatch's since Slurm 22.05
export D2V_HANG_SECONDS=${D2V_HANG_SECONDS:-900}
restart=${SLURM_RESTART_COUNT:-0}
early='' cancelled='' skipped=0

BAD_INPUT=2 UNHEALTHY=3 UNFIT=4 HUNG=5 # exit codes of the ranks; see README.md

log() { printf '%(%F %T)T job %s.%s: %s\n' -1 "$SLURM_JOB_ID" "$restart" "$*"; }
end() { # code, why
  log "$2"
  exit "$1"
}
once() { # runs a command a single time, where the ranks' commands come from
  if ((${#SRUN_OPTIONS[@]})); then
    srun --nodes=1 --ntasks=1 "${SRUN_OPTIONS[@]}" "$@"
  else
    "${LAUNCH[@]}" "$@"
  fi
}
job_field() { scontrol show job -o "$SLURM_JOB_ID" | sed -n "s/.* $1=\([^ ]*\).*/\1/p"; }

run_ranks() { # command subcommand arguments...
  ranks=${SLURM_NTASKS:-$SLURM_NNODES}
  trap 'early=yes' USR2
  run=$(once "$1" "$2" --check --nproc "$ranks" "${@:3}") || exit # it has said what is wrong
  run=$(realpath -m "$run")
  logs=$run/logs/$SLURM_JOB_ID.$restart
  mkdir -p "$logs" "$run/heartbeat" || end 1 "cannot write into $run"
  scontrol show job "$SLURM_JOB_ID" >"$logs/job.txt"
  log "$ranks ranks on $SLURM_JOB_NODELIST; run folder $run"
  give_up_without_progress
  check_nodes
  if ((${#unfit[@]})); then leave_out "${unfit[@]}"; fi
  rm -f "$run"/heartbeat/rank* # of the last start: they would look silent

  if [[ $early ]]; then requeue "asked to stop before the ranks had started"; fi
  export D2V_JOB_LOGS=$logs
  trap 'ask_to_stop' USR2
  trap 'cancelled=yes' TERM # scancel, a lost node, the end of a grace time: never requeue then
  # A node that was cut off keeps its own srun of this job, which at its return may signal what has
  # its step's number: so every restart has another one.
  for ((; restart % 5 > skipped; skipped++)); do srun --nodes=1 --ntasks=1 --quiet true; done
  # --wait=0: the first rank to end sets no limit to others that are still saving.
  srun --kill-on-bad-exit=1 --wait=0 "${SRUN_OPTIONS[@]}" \
    bash -c "$(<"$here/rank.sh")" rank "$run" "$logs" "${LAUNCH[@]}" "$@" &
  step=$!
  watch
  wait "$step"
  finish $?
}

give_up_without_progress() { # counts the restarts in a row that brought no new checkpoint
  local file=$run/logs/$SLURM_JOB_ID.progress most=${D2V_MAX_FRUITLESS:-5} before='' count=0 newest
  newest=$(find "$run/checkpoints" -maxdepth 1 -name '[0-9]*' -printf '%f\n' 2>/dev/null | sort -n | tail -n 1)
  if ((restart)) && [[ -e $file ]]; then
    read -r before count <"$file"
    if [[ ${newest:-none} == "$before" ]]; then count=$((count + 1)); else count=0; fi
  fi
  ((count <= most)) || end 1 "$count restarts without a new checkpoint: giving up; see $run/logs"
  echo "${newest:-none} $count" >"$file"
}

check_nodes() { # every node proves itself within 30 s, or comes into the list `unfit`
  local node report
  unfit=()
  echo "$SLURM_JOB_ID.$restart" >"$logs/token"
  rm -f "$logs"/node-*.txt
  timeout 30 srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --quiet \
    --output="$logs/node-%N.txt" bash -c "$(<"$here/node_check.sh")" node_check \
    "$logs" "$SLURM_JOB_ID.$restart" "${LAUNCH[0]:-}" "$NODE_CHECK"
  for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    report=$(tail -n 1 "$logs/node-$node.txt" 2>/dev/null)
    [[ $report == OK ]] && continue
    log "node $node is not fit: ${report:-no answer within 30 s}"
    unfit+=("$node")
  done
}

ask_to_stop() {
  log "asked to stop (time limit or preemption): the ranks save and end"
  touch "$logs/stop"
  kill -USR2 "$step" 2>/dev/null # srun passes it to every rank, which is quicker than the file
}

watch() { # until the step has ended
  local checked=$SECONDS
  while kill -0 "$step" 2>/dev/null; do
    sleep 1 &
    wait $! # ends at once on a signal
    if ((SECONDS - checked >= (D2V_HANG_SECONDS + 9) / 10)); then
      checked=$SECONDS
      end_if_silent
    fi
  done
}

end_if_silent() { # names the ranks without a recent heartbeat, has all stacks dumped, requeues
  local heard rank own silent=''
  ((SECONDS > D2V_HANG_SECONDS)) || return 0
  heard=$(find "$run/heartbeat" \( -name 'rank*.json' -newermt "-$D2V_HANG_SECONDS seconds" \
    -o -name 'rank*.ended' \) -printf '%f\n' | cut -d. -f1 | sort -u)
  (($(grep -c . <<<"$heard") < ranks)) || return 0
  for ((rank = 0; rank < ranks; rank++)); do
    own=$(printf 'rank%05d' "$rank")
    grep -qx "$own" <<<"$heard" && continue
    silent+=${silent:+, }$rank
    silent+=$(sed -n 's/.*"host": *"\([^"]*\)".*/ on \1/p' "$run/heartbeat/$own.json" 2>/dev/null)
  done
  log "no heartbeat for $D2V_HANG_SECONDS s from rank $silent"
  # The ranks' own watchdogs look for this file and write their stacks into the same folder.
  echo "silent: rank $silent" >"$logs/hung"
  sleep "${D2V_DUMP_SECONDS:-15}" &
  wait $!
  requeue "silent: rank $silent; the others' stacks are in $logs"
}

finish() { # exit code of the step
  local code=$1 rank node file
  if ((code == 0)) && [[ -e $run/DONE ]]; then end 0 "finished"; fi
  # This node may have been cut off, and the job be running elsewhere by now.
  [[ $(job_field Restarts) == "$restart" ]] || end 1 "this is not the job's last start any more"
  if ((code)) && [[ -e $logs/failed ]]; then
    read -r code rank node <"$logs/failed" # srun reports the largest code, not the first
    file=$logs/rank$(printf %05d "$rank").txt
    log "rank $rank on $node ended with exit code $code; the end of $file:"
    tail -n 20 "$file" 2>/dev/null
  fi
  case $code in
    0) ;;
    "$BAD_INPUT" | "$UNHEALTHY") exit "$code" ;;
    "$UNFIT")
      read -ra unfit <"$logs/unfit"
      leave_out "${unfit[@]}"
      ;;
    "$HUNG") requeue "$(cat "$logs/hung" 2>/dev/null)" ;;
    *) # a fault of the code, or of a node: then the others' ranks fail as well, and perhaps first
      if [[ ! $cancelled ]]; then
        check_nodes
        if ((${#unfit[@]})); then leave_out "${unfit[@]}"; fi
      fi
      exit "$code"
      ;;
  esac
  if [[ ! -e $run/STOPPED ]]; then end 1 "the ranks ended well, but wrote neither DONE nor STOPPED"; fi
  if [[ -e $run/STOP ]]; then end 0 "stopped by $run/STOP; remove it and submit again to go on"; fi
  if [[ $cancelled ]]; then end 0 "cancelled; the run is saved"; fi
  requeue "stopped well"
}

leave_out() { # nodes: requeues without them, where that can help
  local partition others
  if (($# >= SLURM_NNODES)); then end 1 "no node is fit, so the cause is probably common to all"; fi
  partition=$(job_field Partition)
  others=$(sinfo -h -N -o %N -p "$partition" -t idle,alloc,mix,comp | sort -u | grep -vxFc -f <(printf '%s\n' "$@"))
  ((others >= SLURM_NNODES)) || end 1 "$partition has too few nodes without $*"
  requeue "without $*" "$*"
}

requeue() { # why, nodes to leave out. Only after the ranks have ended: it kills what still runs
  local without=${2:-} excluded
  [[ $(job_field JobState) == RUNNING ]] || end 0 "not requeued: $(job_field JobState)"
  log "requeue: $1"
  trap '' TERM USR2
  if [[ $without ]]; then # the list of a running job cannot be changed, that of a held one can
    excluded=$(job_field ExcNodeList)
    if [[ $excluded == "(null)" ]]; then excluded=''; else excluded+=,; fi
    scontrol requeuehold "$SLURM_JOB_ID" || end 1 "this cluster does not let jobs requeue themselves"
    for _ in {1..50}; do
      scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$excluded${without// /,}" 2>/dev/null && break
      sleep 0.2
    done
    scontrol release "$SLURM_JOB_ID"
  else
    scontrol requeue "$SLURM_JOB_ID" || end 1 "this cluster does not let jobs requeue themselves"
  fi
  sleep 60 # Slurm ends this script
  exit 1
}
