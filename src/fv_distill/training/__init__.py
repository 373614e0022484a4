"""Where and how long a method runs."""

from fv_distill._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "building": ["build_model", "build_models"],
        "checkpoint": ["CheckpointManager", "complete_checkpoints", "find_checkpoint"],
        "run": [
            "build_accelerator",
            "build_callbacks",
            "build_dataset",
            "build_method",
            "build_trajectory_dataset",
            "build_trainer",
            "export_if_asked",
            "print_dry_run",
            "run_make_trajectories",
            "run_training",
            "run_training_from_config",
        ],
        "run_checks": ["check_run"],
        "sharding": ["make_accelerator"],
        "trainer": ["NonFiniteLossError", "Trainer"],
    },
)
