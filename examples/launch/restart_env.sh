# shellcheck shell=bash
# What torchrun and `accelerate launch` need to start processes again and to end them in peace. Source it before them.

# Else the processes of a second start find the addresses of the first one's in the launcher's store, and wait for them.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Seconds from SIGTERM to SIGKILL, in which the step ends and a checkpoint is written; torch's own 30 are few.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-540}"
