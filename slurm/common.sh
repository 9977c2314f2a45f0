# shellcheck shell=bash
# Shared by the batch scripts: the settings of the cluster, node checks, monitoring of the ranks,
# stopping and requeueing. A script sets `here` to the folder of the scripts and names the
# command to run:
#
#   here=FOLDER; . "$here/common.sh"; run_ranks d2v-ds train "$@"
#
# The command that run_ranks runs has to
#   - print the run folder and exit if it is given --check;
#   - write RUN/heartbeat/rankNNNNN.json regularly, RUN/checkpoints/STEP, and at its end RUN/DONE or
#     RUN/STOPPED;
#   - stop when the file $D2V_JOB_LOGS/stop appears, and on SIGUSR2 and SIGTERM.

log() { printf '%(%F %T)T job %s.%s: %s\n' -1 "$SLURM_JOB_ID" "$restart" "$*"; }
end() { # code, reason
  log "$2"
  exit "$1"
}
restart=${SLURM_RESTART_COUNT:-0}
early='' cancelled='' skipped=0

BAD_INPUT=2 UNHEALTHY=3 UNFIT=4 HUNG=5 # exit codes of the ranks, as in d2v_ds/exit_codes.py

LAUNCH=() SRUN_OPTIONS=() NODE_CHECK=
settings=${D2V_CLUSTER_ENV:-$here/cluster.env}
if [[ -e $settings ]]; then
  bash -n "$settings" || end "$BAD_INPUT" "$settings: cannot be read as bash"
  # shellcheck source=/dev/null
  . "$settings"
elif [[ ${D2V_CLUSTER_ENV:-} ]]; then
  end "$BAD_INPUT" "D2V_CLUSTER_ENV names $settings, which does not exist on $SLURMD_NODENAME"
fi

unset SLURM_EXPORT_ENV # otherwise `sbatch --export=NONE` empties the environment of the ranks, too
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun ignores sbatch's value since Slurm 22.05
export D2V_HANG_SECONDS=${D2V_HANG_SECONDS:-900}

# What Slurm's commands say if the controller is away, as during its restart or a fail-over.
AWAY='unable to contact|connect(ion)? fail|connection (refused|reset|timed out)|timed out|zero bytes|standby|temporarily|not responding'
ask() { # command arguments...: runs a command of Slurm, again and again while the controller is away
  local wait=${D2V_CONTROLLER_SECONDS:-900} waited=0 errors
  while ! errors=$("$@" 2>&1 >&3); do
    if ((waited >= wait)) || ! grep -qiE "$AWAY" <<<"$errors"; then
      printf '%s\n' "$errors" >&2
      return 1
    fi
    if ((!waited)); then log "the controller of Slurm is away; retrying \`$1 $2\` for $wait s" >&2; fi
    sleep 2
    waited=$((waited + 2)) # counted, because the clock may be set
  done 3>&1
  if ((waited)); then log "the controller of Slurm is back" >&2; fi
}
job_field() { ask scontrol show job -o "$SLURM_JOB_ID" | sed -n "s/.* $1=\([^ ]*\).*/\1/p"; }

require_command() { # fails if the environment of the job does not provide a command
  if ((${#LAUNCH[@]} + ${#SRUN_OPTIONS[@]})) || command -v "$1" >/dev/null; then return; fi
  local how="the environment that $settings describes does not provide it"
  if [[ ! -e $settings ]]; then how="$settings does not exist: copy cluster.env.example and edit it"; fi
  end "$BAD_INPUT" "$1: not found on $SLURMD_NODENAME; $how"
}
once() { # runs a command once, in the environment of the ranks
  require_command "$1"
  if ((${#SRUN_OPTIONS[@]})); then
    srun --nodes=1 --ntasks=1 "${SRUN_OPTIONS[@]}" "$@"
  else
    "${LAUNCH[@]}" "$@"
  fi
}

run_ranks() { # command subcommand arguments...
  ranks=${SLURM_NTASKS:-$SLURM_NNODES}
  trap 'early=yes' USR2
  require_command "$1" # `once` runs in a subshell, which cannot end the job
  run=$(once "$1" "$2" --check --nproc "$ranks" "${@:3}") || exit # the command printed the error
  run=$(realpath -m "$run")
  logs=$run/logs/$SLURM_JOB_ID.$restart
  mkdir -p "$logs" "$run/heartbeat" || end 1 "cannot write to $run"
  # Without the arguments, which may hold passwords; config.yaml has the settings.
  ask scontrol show job "$SLURM_JOB_ID" | sed 's/^\( *Command=.*\.sbatch\) .*/\1 .../' >"$logs/job.txt"
  log "$ranks ranks on $SLURM_JOB_NODELIST; run folder $run"
  give_up_without_progress
  check_nodes
  if ((${#unfit[@]})); then leave_out "${unfit[@]}"; fi
  rm -f "$run"/heartbeat/rank* # old heartbeats would count as silent ranks

  if [[ $early ]]; then requeue "stop requested before the ranks started"; fi
  export D2V_JOB_LOGS=$logs
  trap 'ask_to_stop' USR2
  trap 'cancelled=yes' TERM # scancel, a lost node, the end of a grace time: do not requeue
  # If a node is cut off and the job restarts elsewhere, the old srun keeps running. Once it reaches
  # the controller again, it may signal the step with its number, so every restart uses another.
  for ((; restart % 5 > skipped; skipped++)); do srun --nodes=1 --ntasks=1 --quiet true; done
  # --wait=0: when the first rank exits, the ranks that are still saving get no time limit.
  srun --kill-on-bad-exit=1 --wait=0 "${SRUN_OPTIONS[@]}" \
    bash -c "$(<"$here/rank.sh")" rank "$run" "$logs" "${LAUNCH[@]}" "$@" &
  step=$!
  watch
  wait "$step"
  finish $?
}

give_up_without_progress() { # counts consecutive restarts that produced no new checkpoint
  local file=$run/logs/$SLURM_JOB_ID.progress most=${D2V_MAX_FRUITLESS:-5} before='' count=0 newest
  newest=$(find "$run/checkpoints" -maxdepth 1 -name '[0-9]*' -printf '%f\n' 2>/dev/null | sort -n | tail -n 1)
  if ((restart)) && [[ -e $file ]]; then
    read -r before count <"$file"
    if [[ ${newest:-none} == "$before" ]]; then count=$((count + 1)); else count=0; fi
  fi
  ((count <= most)) || end 1 "giving up after $count restarts without a new checkpoint; see $run/logs"
  echo "${newest:-none} $count" >"$file"
}

check_nodes() { # fills `unfit` with the nodes that do not pass node_check.sh within 30 s
  local node report
  unfit=()
  echo "$SLURM_JOB_ID.$restart" >"$logs/token"
  rm -f "$logs"/node-*.txt
  [[ $(job_field JobState) ]] || end 1 "Slurm does not know this job" # waits for the controller
  timeout 30 srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --quiet \
    --output="$logs/node-%N.txt" bash -c "$(<"$here/node_check.sh")" node_check \
    "$logs" "$SLURM_JOB_ID.$restart" "${LAUNCH[0]:-}" "$NODE_CHECK"
  for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    report=$(tail -n 1 "$logs/node-$node.txt" 2>/dev/null)
    [[ $report == OK ]] && continue
    log "node $node is unfit: ${report:-no answer within 30 s}"
    unfit+=("$node")
  done
}

ask_to_stop() {
  log "stop requested (time limit or preemption): the ranks save and exit"
  touch "$logs/stop"
  kill -USR2 "$step" 2>/dev/null # srun forwards it to every rank, which is faster than the file
}

watch() { # returns when the job step has ended
  local seconds=0 checked=0 # counted, because the clock may be set and a job may be suspended
  while kill -0 "$step" 2>/dev/null; do
    sleep 1 &
    wait $! # a signal interrupts it
    seconds=$((seconds + 1))
    if ((seconds - checked >= (D2V_HANG_SECONDS + 9) / 10)); then
      checked=$seconds
      end_if_silent
    fi
  done
}

declare -A beat changed # of each rank: time stamp of its heartbeat, and when it was new to `watch`

end_if_silent() { # if ranks lack a recent heartbeat: names them, requests all stacks, requeues
  local rank own file stamp silent=''
  # Time stamps are only compared with each other: the clocks of nodes and file servers differ.
  while read -r file stamp; do
    own=${file%.*}
    if [[ $file == *.ended || ${beat[$own]:-} != "$stamp" ]]; then changed[$own]=$seconds; fi
    beat[$own]=$stamp
  done < <(find "$run/heartbeat" \( -name 'rank*.json' -o -name 'rank*.ended' \) -printf '%f %T@\n')
  for ((rank = 0; rank < ranks; rank++)); do
    own=$(printf 'rank%05d' "$rank")
    ((seconds - ${changed[$own]:-0} > D2V_HANG_SECONDS)) || continue
    silent+=${silent:+, }$rank
    silent+=$(sed -n 's/.*"host": *"\([^"]*\)".*/ on \1/p' "$run/heartbeat/$own.json" 2>/dev/null)
  done
  [[ $silent ]] || return 0
  log "no heartbeat for $D2V_HANG_SECONDS s from rank $silent"
  # When this file appears, the watchdog of each rank writes its stacks to the same folder.
  echo "silent: rank $silent" >"$logs/hung"
  sleep "${D2V_DUMP_SECONDS:-15}" &
  wait $!
  requeue "rank $silent is silent; the stacks of the other ranks are in $logs"
}

# The run folder, not the exit code, says how a run ended: the folder survives this script and Slurm.
wrote() { [[ $run/$1 -nt $logs/token ]]; } # DONE or STOPPED; since this start began

finish() { # exit code of the job step
  local code=$1 rank node file restarts
  if [[ -e $run/DONE ]] && ((code == 0)); then end 0 "finished"; fi
  if wrote DONE; then end 0 "finished; a rank ended with exit code $code afterwards, see $logs"; fi
  restarts=$(job_field Restarts)
  [[ $restarts ]] || end 1 "the run is not finished, and the job cannot requeue itself; submit it again"
  # This node may have been cut off while the job was restarted on others.
  [[ $restarts == "$restart" ]] || end 1 "a newer start of this job has taken over"
  if ((code)) && [[ -e $logs/failed ]]; then
    read -r code rank node <"$logs/failed" # srun returns the largest code, not the first one
    file=$logs/rank$(printf %05d "$rank").txt
    log "rank $rank on $node failed with exit code $code; the last lines of $file:"
    tail -n 20 "$file" 2>/dev/null
  elif ((code)) && ! compgen -G "$run/heartbeat/rank*" >/dev/null; then
    requeue "srun failed with exit code $code before a rank started"
  fi
  if wrote STOPPED && [[ ! -e $logs/failed ]]; then code=0; fi # srun itself failed afterwards
  case $code in
    0) ;;
    "$BAD_INPUT" | "$UNHEALTHY") exit "$code" ;;
    "$UNFIT")
      read -ra unfit <"$logs/unfit"
      leave_out "${unfit[@]}"
      ;;
    "$HUNG") requeue "$(cat "$logs/hung" 2>/dev/null)" ;;
    *) # a fault of the code or of a node; if a node is bad, other ranks may fail first
      if [[ ! $cancelled ]]; then
        check_nodes
        if ((${#unfit[@]})); then leave_out "${unfit[@]}"; fi
      fi
      exit "$code"
      ;;
  esac
  wrote STOPPED || end 1 "the ranks exited with code 0 but wrote neither DONE nor STOPPED"
  if [[ -e $run/STOP ]]; then end 0 "stopped by $run/STOP; to continue, remove it and submit the job again"; fi
  if [[ $cancelled ]]; then end 1 "cancelled; the run was saved and is not finished"; fi
  requeue "stopped and saved"
}

leave_out() { # nodes: requeues without them, if enough other nodes exist
  local partition others
  if (($# >= SLURM_NNODES)); then end 1 "all nodes of the job are unfit, so they probably share the cause"; fi
  partition=$(job_field Partition)
  others=$(ask sinfo -h -N -o %N -p "$partition" -t idle,alloc,mix,comp | sort -u | grep -vxFc -f <(printf '%s\n' "$@"))
  ((others >= SLURM_NNODES)) || end 1 "partition $partition has too few nodes without $*"
  requeue "without $*" "$*"
}

requeue() { # reason, nodes to exclude. It ends the job and all its ranks
  local without=${2:-} excluded state
  state=$(job_field JobState)
  [[ $state == RUNNING ]] || end 1 "not requeued ($1): the job is ${state:-unknown to Slurm}"
  log "requeue: $1"
  trap '' TERM USR2
  excluded=$(job_field ExcNodeList)
  if [[ $excluded == "(null)" ]]; then excluded=''; else excluded+=,; fi
  ask scontrol requeue "$SLURM_JOB_ID" || end 1 "jobs may not requeue themselves on this cluster"
  if [[ $without ]]; then # possible for a pending job, not for a running one; it waits some seconds
    for _ in {1..50}; do
      ask scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$excluded${without// /,}" 2>/dev/null && break
      sleep 0.2
    done
  fi
  exit 1 # a requeued job ignores it
}
