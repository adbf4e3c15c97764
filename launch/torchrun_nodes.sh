#!/usr/bin/env bash
# Several machines. Run it on each of them, with the same HEAD and NODES:
#
#     HEAD=10.0.0.1 NODES=2 INTERFACE=eth0 launch/torchrun_nodes.sh --task digits
#
# NODES=1:4 lets machines come and go. With NODE (0, 1, …) on every machine the ranks are
# fixed, and the one with NODE=0 is HEAD: for when rank 0 has to be on a certain machine.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${HEAD:?set HEAD to the address of the first machine}"
: "${NODES:?set NODES to the number of machines, or to a range like 1:4}"
RANKS=${RANKS:-1}
PORT=${PORT:-29500}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / RANKS > 0 ? $(nproc) / RANKS : 1))}
# Each attempt meets in a store of its own: in a shared one an attempt finds addresses
# of the one before it (pytorch/pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
address=()
if [ -n "${INTERFACE:-}" ]; then
    # Names of machines need not be known to the others: the interface's address is.
    mine=$(ip -4 -o addr show dev "$INTERFACE" | awk '{sub("/.*", "", $4); print $4; exit}')
    address=(--local-addr "$mine")
    export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi
# On storage that all machines share: ranks may be others after a restart.
CHECKPOINTS=${CHECKPOINTS:-checkpoints}

if [ -n "${NODE:-}" ]; then
    meet=(--master-addr "$HEAD" --master-port "$PORT" --node-rank "$NODE")
else
    meet=(--rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" --rdzv-id "${JOB:-lc3}")
    if [ "${mine:-}" = "$HEAD" ]; then
        meet+=(--rdzv-conf is_host=true)
    fi
fi
exec "${PYTHON:-python3}" -m torch.distributed.run --nnodes "$NODES" "${meet[@]}" ${address[@]+"${address[@]}"} \
    --nproc-per-node "$RANKS" --max-restarts "${RESTARTS:-3}" \
    -m launch.train --checkpoints "$CHECKPOINTS" "$@"
