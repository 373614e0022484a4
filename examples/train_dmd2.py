"""Distil a video model into a few-step student with DMD2.

    accelerate launch examples/train_dmd2.py --config examples/configs/dmd2/digits.yaml

Three copies of the network take part: the frozen teacher, the student, and a critic that learns the student's own
distribution. The student follows the difference between the two scores at its own samples (Yin et al. 2024).
"""

from fv_distill import methods, training
from fv_distill.config import parse_run_config
from fv_distill.console import exit_on_user_error


def main() -> None:
    # The packages above load torch on first use, so that --help and mistakes in the config answer at once.
    config, command_line = parse_run_config(__doc__, method_target="fv_distill.methods.DMD2Method")
    with exit_on_user_error(debug=command_line.debug):
        accelerator = training.build_accelerator(config, dry_run=command_line.dry_run)
        dataset = training.build_dataset(config)

        # Together, since roles may share a network.
        models = training.build_models(config, ["student", "teacher", "critic"])
        method = methods.DMD2Method(models, methods.DMD2Options(**config.method.options))
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
