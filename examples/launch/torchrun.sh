#!/usr/bin/env bash
# Training on several machines with torchrun: the same command on each of them, in any order.
#
#   HEAD=machine-0 MACHINES=2 examples/launch/torchrun.sh examples/train_dmd2.py --config run.yaml
#
#   HEAD              a name or address of one of the machines that all of them reach
#   PORT              a free port of it (29400)
#   MACHINES          how many (1)
#   GPUS_PER_MACHINE  processes on each (8)
#   MAX_RESTARTS      how often processes are started again after one has died (3)
#   RUN_ID            a name that no other run on HEAD has (fv_distill)
#   SHARDING          fsdp2 (default), hsdp (replicated between machines), or none (replicated, as DDP)
set -euo pipefail

if (($# == 0)); then
    sed -n 's/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
export MACHINES="${MACHINES:-1}" GPUS_PER_MACHINE="${GPUS_PER_MACHINE:-8}"
here="$(dirname "${BASH_SOURCE[0]}")"
source "$here/restart_env.sh"
case "${SHARDING:-fsdp2}" in
    fsdp2) source "$here/fsdp2_env.sh" ;;
    hsdp) source "$here/hsdp_env.sh" ;;
    none) ;;
    *) echo "SHARDING=$SHARDING: fsdp2, hsdp or none" >&2; exit 2 ;;
esac

# The same command starts the run and, after any interruption, goes on with it.
[[ "$*" == *--resume-from-checkpoint* ]] || set -- "$@" --resume-from-checkpoint auto

exec torchrun \
    --nnodes "$MACHINES" \
    --nproc-per-node "$GPUS_PER_MACHINE" \
    --max-restarts "${MAX_RESTARTS:-3}" \
    --rdzv-backend c10d \
    --rdzv-id "${RUN_ID:-fv_distill}" \
    --rdzv-endpoint "${HEAD:-localhost}:${PORT:-29400}" \
    "$@"
