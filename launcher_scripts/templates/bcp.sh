#!/bin/bash
# Stage {{ job.stage }} on Base Command Platform. Run it again by hand, in a job of the same size:
#   bash {{ job.script | quote }}
set -euo pipefail

{% include "state.sh" %}
trap 'exit 130' INT
trap 'exit 143' TERM

log={{ log | quote }}_$(date +%m%d_%H%M%S).out
exec > >(trap '' INT TERM && exec tee -a "$log") 2>&1 # all output, into the log and onwards

{% include "environment.sh" %}
{% for group in job.groups %}

# command group {{ loop.index }} of {{ loop.length }}
bcprun {{ size(group, loop.last) }}{{ environment }} --cmd {{ inner(group) | quote }}
{% endfor %}
