#!/usr/bin/env bash
# Sites of several ranks. Run it on each machine of each site, with the same HEAD:
#
#     SITE=0 SITES=2 RANKS=2 HEAD=10.0.0.1 INTERFACE=eth0 launch/sites_torchrun.sh checkpoints 64
#
# With MACHINES=4 in every site, say which of them this is: MACHINE=0 to 3. HEAD is
# machine 0 of site 0. Ranks are numbered site after site, as local_sgd's mesh has them.
# RANKS of a site in all has to be what the script's mesh says: 2 in the example.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${HEAD:?set HEAD to the address of the first machine of the first site}"
: "${SITE:?set SITE to the number of this site, from 0 up}"
SITES=${SITES:-2}
MACHINES=${MACHINES:-1}
RANKS=${RANKS:-2}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / RANKS > 0 ? $(nproc) / RANKS : 1))}
if [ -n "${INTERFACE:-}" ]; then
    export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi
# A rank that dies ends the job: start it again on all machines, it goes on from the
# last step that every site has saved. Sites share no disk, so each has its own folder.
exec "${PYTHON:-python3}" -m torch.distributed.run \
    --nnodes $((SITES * MACHINES)) --node-rank $((SITE * MACHINES + ${MACHINE:-0})) \
    --master-addr "$HEAD" --master-port "${PORT:-29500}" --nproc-per-node "$RANKS" \
    -m experiments.examples.sites "$@"
