#!/bin/bash
{% for line in directives %}
#SBATCH {{ line }}
{% endfor %}
#
# Stage {{ job.stage }} on Slurm. Run it again by hand:
#   sbatch{% if after %} --dependency=singleton{% endif %} {{ job.script | quote }}
set -euo pipefail

{% include "state.sh" %}

{% include "requeue.sh" %}

{% include "task.sh" %}

{% include "environment.sh" %}
{% for line in job.key_lines %}
{{ line }}
{% endfor %}
unset RANK LOCAL_RANK WORLD_SIZE # of whoever submitted this: the ranks are Slurm's
{% for group in job.groups %}

# command group {{ loop.index }} of {{ loop.length }}
group_{{ loop.index }}() {
  {{ job.python_path }}
{% for command in group.commands %}
  {{ command.removeprefix("exec ") }}
{% endfor %}
}
{% if not group.alone %}
{% if "MASTER_ADDR" not in job.environment %}
export MASTER_ADDR={{ "127.0.0.1" if job.resources.nodes == 1 else "${SLURMD_NODENAME:-$HOSTNAME}" }}
{% endif %}
{% if "MASTER_PORT" not in job.environment %}
MASTER_PORT=$(free_port {{ loop.index0 }})
export MASTER_PORT
{% endif %}
{% endif %}
step group_{{ loop.index }} {{ srun(group) }}
{% endfor %}
