processes=() # of this job{{ ", by rank" if who == "rank $rank" }}
go_on() { # where they have checkpointed
  [ "$checkpointed" = no ] || echo {{ ("checkpointed; to go on: bash %s" % job.script) | quote }}
}
stop() { # EXIT_CODE SECONDS: asks them to checkpoint and end; after that, or asked again, insists
  local code=$1 tenths=$((10 * $2)) pid
  trap 'tenths=0' INT TERM HUP
  trap '' USR1 USR2
  kill -TERM "${processes[@]}" 2>/dev/null || exit "$code"
  while ((tenths-- > 0)) && kill -0 "${processes[@]}" 2>/dev/null; do
    sleep 0.1
  done
  kill -KILL "${processes[@]}" 2>/dev/null || true
  for pid in "${processes[@]}"; do
    wait "$pid" || [ $? -ne 75 ] || checkpointed=yes
  done
  go_on
  exit "$code"
}
cancel() { # EXIT_CODE: a person wants the end
  failure=CANCELLED
  stop "$1" {{ [job.signal_seconds, 20] | max }}
}
checkpointed=no
trap 'cancel 129' HUP
trap 'cancel 130' INT
trap 'cancel 143' TERM
trap 'kill -USR1 "${processes[@]}" 2>/dev/null || true' USR1
trap 'kill -USR2 "${processes[@]}" 2>/dev/null || true' USR2
await() { # waits for all; the first that fails ends the others, and its code is the job's
  local rank code failed=0
  while [ -n "${processes[*]}" ]; do
    wait -n 2>/dev/null || true # bash has its own words for a killed process
    for rank in "${!processes[@]}"; do
      kill -0 "${processes[rank]}" 2>/dev/null && continue
      code=0
      wait "${processes[rank]}" || code=$?
      unset "processes[rank]"
      if ((code == 75)); then
        checkpointed=yes
      elif ((code > 128)); then
        echo "{{ who }}: killed by signal $(kill -l "$code")" >&2
        failed=$code
      elif ((code > 0)); then
        ((code == 76)) || echo "{{ who }}: failed with exit code $code" >&2
        # Where one is killed others fail of it; 76 are those that know.
        ((failed > 128 || failed > 0 && code == 76)) || failed=$code
      fi
    done
    ((failed == 0)) || stop "$failed" 20
  done
  go_on
  [ "$checkpointed" = no ] || exit 75
}
