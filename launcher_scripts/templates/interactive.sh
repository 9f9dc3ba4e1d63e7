#!/bin/bash
# Stage {{ job.stage }} on this machine. Run it again by hand:
#   bash {{ job.script | quote }}
set -euo pipefail

{% include "state.sh" %}

log={{ log | quote }}_$(date +%m%d_%H%M%S).out
exec > >(trap '' INT TERM && exec tee -a "$log") 2>&1 # all output, into the log and onwards

processes=()
stop() { # EXIT_CODE: asks the processes to end, and after 20 s insists
  trap '' INT TERM
  kill -TERM "${processes[@]}" 2>/dev/null || exit "$1"
  for _ in {1..100}; do
    kill -0 "${processes[@]}" 2>/dev/null || exit "$1"
    sleep 0.2
  done
  kill -KILL "${processes[@]}" 2>/dev/null || true
  exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM

{% include "environment.sh" %}
{% for line in job.key_lines %}
{{ line }}
{% endfor %}
{{ job.python_path }}
{% for group in job.groups %}

# command group {{ loop.index }} of {{ loop.length }}
group_{{ loop.index }}() {
{% for command in group.commands %}
  {{ command }}
{% endfor %}
}
{% if group.alone or processes == 1 %}
group_{{ loop.index }} &
processes=($!)
wait -n || stop $?
{% else %}
# One process for each device; the first that fails ends the others, and its code is the job's
# (torchrun does the same, but turns every code into 1).
MASTER_PORT=$({{ job.python | quote }} -c \
  'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
export MASTER_ADDR=127.0.0.1 MASTER_PORT WORLD_SIZE={{ processes }}
processes=()
for ((rank = 0; rank < WORLD_SIZE; rank++)); do
  RANK=$rank LOCAL_RANK=$rank group_{{ loop.index }} &
  processes+=($!)
done
for ((rank = 0; rank < WORLD_SIZE; rank++)); do
  wait -n || stop $?
done
{% endif %}
{% endfor %}
