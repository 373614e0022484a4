# shellcheck shell=bash
# Sharding with FSDP2 for processes that torchrun starts: the variables that
# `accelerate launch --config_file configs/accelerate/fsdp2_8gpu.yaml` sets. Source it before torchrun.
export ACCELERATE_MIXED_PRECISION=bf16
export ACCELERATE_USE_FSDP=true
export FSDP_VERSION=2
export FSDP_AUTO_WRAP_POLICY=TRANSFORMER_BASED_WRAP
export FSDP_STATE_DICT_TYPE=SHARDED_STATE_DICT
export FSDP_RESHARD_AFTER_FORWARD=true
export FSDP_ACTIVATION_CHECKPOINTING=false
export FSDP_CPU_RAM_EFFICIENT_LOADING=false
