#!/usr/bin/env bash
# Runs SCRIPT in GPUS processes, one a GPU, or on the CPU where there is none:
#   [NNODES=1] [NODE_RANK=0] [MASTER_ADDR=127.0.0.1] [PORT=29500] dist.sh SCRIPT GPUS [arguments of SCRIPT]
# The tools' dist_train.sh and dist_test.sh call it.
set -euo pipefail

script=$1 gpus=$2
shift 2
if ! [[ $gpus =~ ^[1-9][0-9]*$ ]]; then
  echo "error: GPUS is a number of processes, got '$gpus'" >&2
  exit 2
fi
exec python -m torch.distributed.run --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
  --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" --nproc_per_node="$gpus" \
  "$script" "$@" --launcher pytorch
