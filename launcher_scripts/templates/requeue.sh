# What ends a run of this job and what does not: a signal and a lost node have it queued anew, an
# error of its own has not.
max_requeues={{ job.max_requeues }}
job=${job_id//\"/} # of an array this task: the number of one of the tasks means the whole array
ending= # the exit code, where the end has come from outside
told() { # TERM, to the stage as well: scancel, the time limit, a preemption, another node lost
  local books restarts
  books=$(scontrol --oneliner show job "$job" 2>/dev/null) || return 0
  restarts=${books#* Restarts=} restarts=${restarts%% *}
  case $books in
  *" JobState=RUNNING "*) return 0 ;; # a warning: the stage checkpoints and ends
  *" Reason=TimeLimit "*)
    echo "{{ job.stage }}: the time limit came before it had checkpointed and ended: raise" \
      "run.time_limit or run.signal_seconds, and launch it again to go on" >&2
    ;;
  *" Restarts=$requeues "*) failure=CANCELLED ;;
  *)
    trap - EXIT
    requeues=$restarts
    write_state REQUEUED null null
    ending=75
    return 0
    ;;
  esac
  ending=143
  write_state "$failure" "$ending" "\"$(now)\"" # at once: little time is left
}
trap told TERM
heed() { # an end from outside makes srun fail before TERM comes here: ask before one concludes
  [ -n "$ending" ] || told
  [ -z "$ending" ] || exit "$ending"
}
give_up() { # WHY
  echo "{{ job.stage }}: $1, and this job was queued anew $requeues times, where" \
    "run.max_requeues=$max_requeues: launch it again to go on from its checkpoint" >&2
  exit 75
}
requeue() { # WHY
  ((requeues < max_requeues)) || give_up "$1"
  requeues=$((requeues + 1))
  echo "{{ job.stage }}: $1: queued anew ($requeues of run.max_requeues=$max_requeues)"
  write_state REQUEUED 75 null
  trap '' TERM # which is how the requeue itself ends this script
  local answer
  if answer=$(scontrol requeue "$job" 2>&1); then
    trap - EXIT
    exit 75
  fi
  requeues=$((requeues - 1))
  echo "{{ job.stage }}: Slurm does not queue it anew: $answer: launch it again to go on" >&2
  exit 75
}
((requeues <= max_requeues)) || give_up "a node was lost"
node_lost() { # whether one of the nodes starts nothing any more
  ((${SLURM_JOB_NUM_NODES:-1} > 1)) && ! timeout 60 srun --overlap true
}
step() { # GROUP OPTIONS_OF_SRUN: returns where all processes succeeded
  srun "${@:2}" bash -c "$(declare -f task ended out_of_memory "$1"); task $1" &
  local pid=$! code=0
  while kill -0 "$pid" 2>/dev/null; do
    wait "$pid" || true # ends at TERM too
  done
  wait "$pid" || code=$?
  [ "$code" -ne 0 ] || return 0
  heed
  case $code in # as `ended` gives them
  75) requeue "checkpointed" ;;
  76 | 254) requeue "a process was killed" ;;
  esac
  if node_lost; then
    heed
    requeue "a node was lost"
  elif ((code == 253)); then # Slurm's own
    echo "{{ job.stage }}: out of memory" >&2
    exit 1
  elif ((code >= 192)); then
    exit $((code - 192))
  elif ((code > 128)); then
    requeue "its processes were killed"
  fi
  exit "$code"
}
free_port() { # GROUP: a port that nothing uses here, and that no other job tries first
  local port=$((${SLURM_JOB_ID:-0} + 4099 * $1)) used
  while
    port=$((15000 + port % 16000)) # below the ports that the system hands out
    printf -v used '^ *[0-9]+: [0-9A-F]+:%04X ' "$port"
    grep -qsE "$used" /proc/net/tcp /proc/net/tcp6
  do
    port=$((port + 131))
  done
  echo "$port"
}
