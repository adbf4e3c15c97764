#!/usr/bin/env bash
# mpirun of OpenMPI starts the ranks; gloo, not MPI, carries the bytes.
#
#     RANKS=4 HOSTS=a:2,b:2 INTERFACE=eth0 launch/mpirun.sh --task digits --method 3lc
set -euo pipefail
cd "$(dirname "$0")/.."

RANKS=${RANKS:-2}
options=(-np "$RANKS" -x "OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}")
if [ -n "${HOSTS:-}" ]; then
    first=${HOSTS%%,*}
    options+=(--host "$HOSTS" -x "MASTER_ADDR=${first%%:*}" -x "MASTER_PORT=${PORT:-29500}")
fi
if [ -n "${INTERFACE:-}" ]; then
    options+=(-x "GLOO_SOCKET_IFNAME=$INTERFACE" -x "NCCL_SOCKET_IFNAME=$INTERFACE")
fi
if [ "$(id -u)" = 0 ]; then
    options+=(--allow-run-as-root) # in containers
fi

exec mpirun "${options[@]}" "${PYTHON:-python3}" -m launch.train \
    --checkpoints "${CHECKPOINTS:-checkpoints}" "$@"
