{% for key, value in job.environment.items() %}
export {{ key }}={{ value | quote }}
{% endfor %}
