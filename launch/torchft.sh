#!/usr/bin/env bash
# Machines that come and go. On one machine that stays:
#
#     BIND=10.0.0.1 launch/torchft.sh lighthouse
#
# On each of the others, whenever it is there; a replica that ends is started again:
#
#     LIGHTHOUSE=http://10.0.0.1:29510 ADDRESS=10.0.0.7 launch/torchft.sh replica -m my_training
#
# Default: lc3's example. GRACE_MS is how long ranks wait for one that is late: as long as
# from one exchange to the next, or equally fast ones may miss each other. BIND is in a VPN or a private network: whoever reaches it can join.
set -euo pipefail
cd "$(dirname "$0")/.."

BIND=${BIND:-127.0.0.1}
PORT=${PORT:-29510}
case "${1:-}" in
lighthouse)
    exec "${TORCHFT_LIGHTHOUSE_PROGRAM:-torchft_lighthouse}" --bind "$BIND:$PORT" \
        --min_replicas "${LEAST:-1}" \
        --join_timeout_ms "${GRACE_MS:-2000}" \
        --heartbeat_timeout_ms "${HEARTBEAT_MS:-5000}" \
        --quorum_tick_ms "${TICK_MS:-50}"
    ;;
replica)
    shift
    export TORCHFT_LIGHTHOUSE=${LIGHTHOUSE:-http://$BIND:$PORT}
    export ADDRESS=${ADDRESS:-127.0.0.1} # of this machine, for the others
    export REPLICA=${REPLICA:-$(hostname)-$$}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}
    if [ -n "${INTERFACE:-}" ]; then
        export GLOO_SOCKET_IFNAME=$INTERFACE
    fi
    if [ $# -eq 0 ]; then
        set -- -m experiments.examples.with_torchft
    fi
    # A job of one rank: torchrun keeps the store that the manager needs, and starts the
    # rank again when it ends badly. So that store has to be shared.
    unset TORCH_DISABLE_SHARE_RDZV_TCP_STORE
    exec "${PYTHON:-python3}" -m torch.distributed.run --standalone --nproc-per-node 1 \
        --max-restarts "${RESTARTS:-1000}" "$@"
    ;;
*)
    echo "say lighthouse or replica: $0 replica -m my_training" >&2
    exit 2
    ;;
esac
