#!/bin/bash
{% for line in directives %}
#SBATCH {{ line }}
{% endfor %}
#
# Stage {{ stage }} on Slurm for {{ jobs | length }} points of a sweep: each task of this array runs
# the script of its point, in the point's folder. Submit it again by hand:
#   sbatch{% if after %} --dependency=singleton{% endif %} {{ script | quote }}
set -euo pipefail

scripts=(
{% for job in jobs %}
  {{ job.script | quote }}
{% endfor %}
)
script=${scripts[SLURM_ARRAY_TASK_ID]}
name=${script##*/}
log=${script%/*}/log-${name%_submission.sh}_${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
exec bash "$script" >>"$log.out" 2>>"$log.err"
