#!/usr/bin/env bash
# Runs SCRIPT under Slurm, one task a GPU, on one node or many:
#   [GPUS=8] [GPUS_PER_NODE=8] [CPUS_PER_TASK=5] [SRUN_ARGS="--time=24:00:00"] \
#     slurm.sh PARTITION JOB_NAME SCRIPT [arguments of SCRIPT]
# The tools' slurm_train.sh and slurm_test.sh call it.
set -euo pipefail

partition=$1 job_name=$2
shift 2
gpus=${GPUS:-8}
gpus_per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}

# The first node of the job is known only within it. Expanded there, hence the single quotes.
# shellcheck disable=SC2016
task='export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
exec python -u "$@" --launcher slurm'

# shellcheck disable=SC2086
exec srun --partition="$partition" --job-name="$job_name" --gres=gpu:"$gpus_per_node" --ntasks="$gpus" \
  --ntasks-per-node="$gpus_per_node" --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 \
  ${SRUN_ARGS:-} bash -c "$task" bash "$@"
