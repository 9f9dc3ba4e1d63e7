{% for key, value in job.environment.items() %}
export {{ key }}={{ value | quote }}
{% endfor %}
{% if job.wandb_key_file %}
WANDB_API_KEY="$(<{{ job.wandb_key_file | quote }})" # read here, so that no key is written down
export WANDB_API_KEY
{% endif %}
