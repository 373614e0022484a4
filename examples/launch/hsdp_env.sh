# shellcheck shell=bash
# The same, sharded inside a machine and replicated between machines: what
# configs/accelerate/hsdp_multinode.yaml sets. Needs MACHINES and GPUS_PER_MACHINE.
source "$(dirname "${BASH_SOURCE[0]}")/fsdp2_env.sh"
export ACCELERATE_USE_PARALLELISM_CONFIG=true
export PARALLELISM_CONFIG_DP_REPLICATE_SIZE="${MACHINES:?set it to the number of machines}"
export PARALLELISM_CONFIG_DP_SHARD_SIZE="${GPUS_PER_MACHINE:?set it to the GPUs of one machine}"
export PARALLELISM_CONFIG_TP_SIZE=1
export PARALLELISM_CONFIG_CP_SIZE=1
