#!/usr/bin/env bash
# horovodrun starts the ranks. Install Horovod with launch/install_horovod.sh first.
# A script of yours with hvd.DistributedOptimizer needs only the class of
# lc3.hooks.horovod in its place; this one runs launch.train over gloo.
#
#     RANKS=4 HOSTS=a:2,b:2 INTERFACE=eth0 launch/horovodrun.sh --task digits
set -euo pipefail
cd "$(dirname "$0")/.."

options=(--gloo -np "${RANKS:-2}")
if [ -n "${HOSTS:-}" ]; then
    first=${HOSTS%%,*}
    export MASTER_ADDR=${first%%:*} MASTER_PORT=${PORT:-29500}
    options+=(-H "$HOSTS")
fi
if [ -n "${INTERFACE:-}" ]; then
    export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
    options+=(--network-interfaces "$INTERFACE") # an unknown one aborts Horovod
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

exec "${HOROVODRUN:-horovodrun}" "${options[@]}" "${PYTHON:-python3}" -m launch.train \
    --checkpoints "${CHECKPOINTS:-checkpoints}" "$@"
