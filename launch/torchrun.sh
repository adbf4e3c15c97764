#!/usr/bin/env bash
# One machine: as many ranks as it has cores to spare, restarted up to three times.
#
#     RANKS=2 launch/torchrun.sh --task digits --method 3lc
set -euo pipefail
cd "$(dirname "$0")/.."

RANKS=${RANKS:-2}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / RANKS > 0 ? $(nproc) / RANKS : 1))}
# Each attempt meets in a store of its own: in a shared one an attempt finds addresses
# of the one before it (pytorch/pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# A restarted job goes on from its last checkpoint.
CHECKPOINTS=${CHECKPOINTS:-checkpoints}

exec "${PYTHON:-python3}" -m torch.distributed.run --standalone \
    --nproc-per-node "$RANKS" --max-restarts "${RESTARTS:-3}" \
    -m launch.train --checkpoints "$CHECKPOINTS" "$@"
