#!/bin/bash
# Stage {{ job.stage }} on Base Command Platform. Run it again by hand, in a job of the same size:
#   bash {{ job.script | quote }}
set -euo pipefail

{% include "state.sh" %}

log={{ log | quote }}_$(date +%m%d_%H%M%S).out
# all output, into the log and onwards
exec > >(trap '' INT TERM HUP USR1 USR2 && exec tee -a "$log") 2>&1

{% set who = "bcprun" %}
{% include "processes.sh" %}

{% include "environment.sh" %}
{% for group in job.groups %}

# command group {{ loop.index }} of {{ loop.length }}
bcprun {{ size(group, loop.last) }}{{ environment }} --cmd {{ inner(group) | quote }} &
processes=($!)
await
{% endfor %}
