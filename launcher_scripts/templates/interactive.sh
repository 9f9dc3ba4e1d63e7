#!/bin/bash
# Stage {{ job.stage }} on this machine. Run it again by hand:
#   bash {{ job.script | quote }}
set -euo pipefail

{% include "state.sh" %}

log={{ log | quote }}_$(date +%m%d_%H%M%S).out
# all output, into the log and onwards
exec > >(trap '' INT TERM HUP USR1 USR2 && exec tee -a "$log") 2>&1

{% set who = "rank $rank" %}
{% include "processes.sh" %}

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
{% else %}
# One process for each device (torchrun does the same, but turns every exit code into 1).
MASTER_PORT=$({{ job.python | quote }} -c \
  'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
export MASTER_ADDR=127.0.0.1 MASTER_PORT WORLD_SIZE={{ processes }}
for ((rank = 0; rank < WORLD_SIZE; rank++)); do
  RANK=$rank LOCAL_RANK=$rank group_{{ loop.index }} &
  processes[rank]=$!
done
{% endif %}
await
{% endfor %}
