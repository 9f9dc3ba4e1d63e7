#!/usr/bin/env bash
# A real base on real questions, on this machine's processor: the base, a bottleneck adapter, IA3.
#
#   benchmarks/squad_smollm2.sh BASE WORK [override ...]
#
# BASE: the folder that benchmarks/smollm2_base.py wrote. WORK: where data and results go.
# GRAFTWERK_SHARED: the folder of shared data with data/squad/xquad.en.json (default: ../shared).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
base=${1:?usage: squad_smollm2.sh BASE WORK [override ...]}
work=${2:?usage: squad_smollm2.sh BASE WORK [override ...]}
shift 2
shared=${GRAFTWERK_SHARED:-$root/../shared}

words=(
  "stages=[data_prep,adapter_learning,ia3_learning,eval]" cluster_type=interactive
  "data_dir=$work/data" "base_results_dir=$work/results"
  "data_prep.source=$shared/data/squad/xquad.en.json"
  "data_prep.split={train: 180, val: 0, test: 60}"
  eval.run.model_train_name=smollm2 eval.trainer.accelerator=cpu eval.trainer.precision=32
  adapter_learning.model.adapter_tuning.adapter_dim=32
  adapter_learning.model.adapter_tuning.adapter_dropout=0
  adapter_learning.model.optim.lr=1e-3 ia3_learning.model.optim.lr=1e-2
)
for stage in adapter_learning ia3_learning; do
  words+=(
    "$stage.run.model_train_name=smollm2" "$stage.model.language_model_path=$base"
    "$stage.trainer.devices=1" "$stage.trainer.accelerator=cpu" "$stage.trainer.precision=32"
    "$stage.trainer.max_steps=60" "$stage.trainer.log_every_n_steps=5"
    "$stage.model.global_batch_size=8" "$stage.model.micro_batch_size=4"
    "$stage.model.optim.sched.warmup_steps=6" "$stage.model.data.num_workers=0"
  )
done
exec python3 "$root/main.py" "${words[@]}" "$@"
