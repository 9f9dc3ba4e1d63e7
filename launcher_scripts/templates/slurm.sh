#!/bin/bash
{% for line in directives %}
#SBATCH {{ line }}
{% endfor %}
#
# Stage {{ job.stage }} on Slurm. Run it again by hand:
#   sbatch{% if after %} --dependency=singleton{% endif %} {{ job.script | quote }}
set -euo pipefail

{% include "state.sh" %}
trap 'exit 130' INT
trap 'exit 143' TERM

{% include "environment.sh" %}
{% for line in job.key_lines %}
{{ line }}
{% endfor %}
{% for group in job.groups %}

# command group {{ loop.index }} of {{ loop.length }}
srun {{ srun(group) }} bash -c {{ inner(group) | quote }}
{% endfor %}
