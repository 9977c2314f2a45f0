# shellcheck shell=bash
# Runs one rank and records the first failure among all ranks.
#
#   bash -c "$(<rank.sh)" rank RUN LOGS COMMAND...
run=$1 logs=$2
shift 2
trap '' USR2 # must not kill the command before it handles the signal; the stop file still works
trap : TERM  # the command handles it; bash waits for the command
# Rank 0 writes to the output of the job. Every other rank writes to its own log file.
own=$(printf 'rank%05d' "$SLURM_PROCID")
if ((SLURM_PROCID)); then exec >>"$logs/$own.txt" 2>&1; fi
"$@"
code=$?
touch "$run/heartbeat/$own.ended" # otherwise the rank would count as silent
leave() { # ends this task when Slurm's controller can take note of it
  # Otherwise Slurm tells the controller a minute later, and the job cannot be requeued until then.
  trap 'exit "$code"' TERM
  if ((SLURM_LOCALID == 0)) && command -v scontrol >/dev/null; then
    for ((waited = 0; waited < ${D2V_CONTROLLER_SECONDS:-900}; waited += 3)); do
      timeout 2 scontrol ping 2>/dev/null | grep -q 'is UP' && break
      sleep 1
    done
  fi
  exit "$code"
}
((code)) || leave
set -o noclobber
{ echo "$code $SLURM_PROCID $SLURMD_NODENAME" >"$logs/failed"; } 2>/dev/null
# When this task exits, Slurm kills the others, so wait for ranks that are saving: until their
# heartbeats do not change for 30 s. Time stamps are only compared with each other.
last='' same=0
for _ in {1..300}; do
  saving=$(find "$run/heartbeat" -name 'rank*.json' ! -name "$own.json" \
    -exec grep -q '"phase": "saving"' {} \; -printf '%f %T@\n' 2>/dev/null)
  [[ $saving ]] || break
  if [[ $saving == "$last" ]]; then same=$((same + 1)); else same=0 last=$saving; fi
  ((same < 30)) || break
  sleep 1
done
leave
