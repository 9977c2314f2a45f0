# shellcheck shell=bash
# One rank: runs the command and records the first failure of all ranks.
#
#   bash -c "$(<rank.sh)" rank RUN LOGS COMMAND...
run=$1 logs=$2
shift 2
trap '' USR2 # a request to stop that comes before the command listens is not lost: see common.sh
trap : TERM  # the command's matter: bash waits for it
# Rank 0 writes to the job's output, the others each to a log, to which their own logging goes too.
own=$(printf 'rank%05d' "$SLURM_PROCID")
if ((SLURM_PROCID)); then exec >>"$logs/$own.txt" 2>&1; fi
"$@"
code=$?
touch "$run/heartbeat/$own.ended" # else its heartbeat would seem to have stopped
((code)) || exit 0
set -o noclobber
{ echo "$code $SLURM_PROCID $SLURMD_NODENAME" >"$logs/failed"; } 2>/dev/null
# The end of this task ends all others, so it waits for those that are saving.
for _ in {1..300}; do
  find "$run/heartbeat" -name 'rank*.json' ! -name "$own.json" -newermt '-30 seconds' \
    -exec grep -q '"phase": "saving"' {} \; -print 2>/dev/null | grep -q . || break
  sleep 1
done
exit "$code"
