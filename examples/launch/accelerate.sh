#!/usr/bin/env bash
# Training on several machines with `accelerate launch`: on each of them, with its own MACHINE from 0 on.
#
#   HEAD=machine-0 MACHINE=0 MACHINES=2 examples/launch/accelerate.sh examples/train_dmd2.py --config run.yaml
#
#   HEAD              a name or address of machine 0 that all of them reach
#   PORT              a free port of it (29500)
#   MACHINE           which machine this is (0)
#   MACHINES          how many (2)
#   GPUS_PER_MACHINE  processes on each (8)
#   MAX_RESTARTS      how often processes are started again after one has died (3)
#   CONFIG_FILE       accelerate's config (configs/accelerate/hsdp_multinode.yaml)
set -euo pipefail

if (($# == 0)); then
    sed -n 's/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
machines="${MACHINES:-2}" gpus="${GPUS_PER_MACHINE:-8}"
here="$(dirname "${BASH_SOURCE[0]}")"
source "$here/restart_env.sh"

# The same command starts the run and, after any interruption, goes on with it.
[[ "$*" == *--resume-from-checkpoint* ]] || set -- "$@" --resume-from-checkpoint auto

# The rendezvous is given here, as accelerate doesn't read it from its config, and the static one can't start processes
# again.
exec accelerate launch \
    --config_file "${CONFIG_FILE:-$here/../../configs/accelerate/hsdp_multinode.yaml}" \
    --num_machines "$machines" \
    --num_processes "$((machines * gpus))" \
    --parallelism_config_dp_replicate_size "$machines" \
    --parallelism_config_dp_shard_size "$gpus" \
    --machine_rank "${MACHINE:-0}" \
    --main_process_ip "${HEAD:-localhost}" \
    --main_process_port "${PORT:-29500}" \
    --rdzv_backend c10d \
    --max_restarts "${MAX_RESTARTS:-3}" \
    "$@"
