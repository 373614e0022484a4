"""Distil a video model into a few-step student by regression on the teacher's own sampling paths.

    accelerate launch examples/train_kd.py --config examples/configs/kd/digits.yaml
    accelerate launch examples/train_kd.py --config examples/configs/kd_causal/digits.yaml

The first run makes the paths in method.teacher_path_cache (so does `fv-distill make-trajectories`); then the teacher is
freed. With KDCausalMethod the student is causal: the initialisation that Self-Forcing starts from.
"""

from fv_distill import training
from fv_distill.config import parse_run_config
from fv_distill.console import exit_on_user_error

METHODS = ("fv_distill.methods.KDMethod", "fv_distill.methods.KDCausalMethod")


def main() -> None:
    # The packages above load torch on first use, so that --help and mistakes in the config answer at once.
    config, command_line = parse_run_config(__doc__, method_target=METHODS)
    with exit_on_user_error(debug=command_line.debug):
        accelerator = training.build_accelerator(config, dry_run=command_line.dry_run)
        dataset = training.build_trajectory_dataset(config, accelerator, dry_run=command_line.dry_run)

        student = training.build_model(config, "student")
        method = training.build_method(config, {"student": student})
        training.check_run(dataset, method, config)

        callbacks = training.build_callbacks(config)
        trainer = training.Trainer(accelerator, method, dataset, config, callbacks)
        if command_line.dry_run:
            training.print_dry_run(trainer)
        else:
            trainer.train()
            training.export_if_asked(trainer)
        accelerator.end_training()


if __name__ == "__main__":
    main()
