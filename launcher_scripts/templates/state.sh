# state.json: how this job stands, also where the cluster keeps no accounts.
state_file={{ job.state_file | quote }}
job_id={{ job_id }}
requeues=${SLURM_RESTART_COUNT:-0} # how often Slurm has started this job anew
now() { date -u +%Y-%m-%dT%H:%M:%SZ; }
started=$(now)
before='"state": "SUBMITTED"'
((requeues == 0)) || before=stage # a run before this one has left its own
submitted=$(sed -n "/$before/"'s/.*"submitted": "\([^"]*\)".*/\1/p' "$state_file" 2>/dev/null || true)
write_state() { # STATE EXIT_CODE ENDED
  local format='{"stage": "%s", "job_name": %s, "job_id": %s, "state": "%s", "exit_code": %s, '
  format+='"submitted": "%s", "started": "%s", "ended": %s, "requeues": %s}\n'
  printf "$format" {{ job.stage }} {{ job.name | json | quote }} "${job_id:-null}" "$1" "$2" \
    "${submitted:-$started}" "$started" "$3" "$requeues" >"$state_file.$$" &&
    mv -f "$state_file.$$" "$state_file"
}
failure=FAILED # or CANCELLED, where a person wanted the end
finish() {
  local code=$? state=$failure
  trap - EXIT
  [ "$code" -ne 0 ] || state=COMPLETED
  write_state "$state" "$code" "\"$(now)\"" || echo "cannot write $state_file" >&2
  exit "$code"
}
trap finish EXIT
write_state RUNNING null null
