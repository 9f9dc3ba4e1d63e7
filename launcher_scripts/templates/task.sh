# Each process of a step is a `task`: a shell that runs the stage and tells how it ended.
task() { # GROUP
  set -euo pipefail
  trap : USR1 USR2 TERM # the stage hears them too, and ends in its own time
  trap 'ended $?' EXIT
  "$1"
}
ended() { # EXIT_CODE: names the rank. srun returns the highest code of all, so codes are ranked:
  # asked to end (75) < alone since another is lost (76) < an error of its own (192 + code) < killed
  local rank="rank ${SLURM_PROCID:-0} on ${SLURMD_NODENAME:-$HOSTNAME}"
  case $1 in
  0 | 75 | 76) exit "$1" ;;
  143) exit 75 ;; # TERM before the stage could hear it, by srun too where another rank has failed
  137 | 138 | 140)
    if [ "$1" -ne 137 ] || ! out_of_memory; then
      echo "$rank: killed by signal $(kill -l "$1")" >&2
      exit 254
    fi
    echo "$rank: out of memory" >&2
    exit 193
    ;;
  *)
    echo "$rank: failed with exit code $1" >&2
    exit $(($1 < 60 ? 192 + $1 : 193))
    ;;
  esac
}
out_of_memory() { # the kernel's word on this task
  local two one
  two=$(sed -n 's/^0:://p' /proc/self/cgroup)
  one=$(sed -n 's/^[0-9]*:memory://p' /proc/self/cgroup)
  grep -qs '^oom_kill [1-9]' "/sys/fs/cgroup$two/memory.events" \
    "/sys/fs/cgroup/memory$one/memory.oom_control"
}
