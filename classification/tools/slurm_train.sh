#!/usr/bin/env bash
# Trains under Slurm, one task a GPU, on one node or many:
#   [GPUS=16] [GPUS_PER_NODE=8] [CPUS_PER_TASK=8] [SRUN_ARGS="--time=24:00:00"] \
#     tools/slurm_train.sh PARTITION JOB_NAME CONFIG DATA_PATH [arguments of main.py]
# Slurm sends USR1 two minutes before it ends the job; the run is then saved, and the same command goes on from there.
set -euo pipefail

if [ $# -lt 4 ]; then
  echo "usage: $0 PARTITION JOB_NAME CONFIG DATA_PATH [arguments of main.py]" >&2
  exit 2
fi
partition=$1 job_name=$2 config=$3 data_path=$4
shift 4
gpus=${GPUS:-8}
gpus_per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
main=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/main.py

# The first node of the job is known only within it. Expanded there, hence the single quotes.
# shellcheck disable=SC2016
task='export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
exec python -u "$@"'

# shellcheck disable=SC2086
exec srun --partition="$partition" --job-name="$job_name" --gres=gpu:"$gpus_per_node" --ntasks="$gpus" \
  --ntasks-per-node="$gpus_per_node" --cpus-per-task="${CPUS_PER_TASK:-8}" --kill-on-bad-exit=1 --signal=USR1@120 \
  ${SRUN_ARGS:-} bash -c "$task" bash "$main" --cfg "$config" --data-path "$data_path" "$@"
