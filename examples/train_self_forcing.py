"""Distil a video model into a few-step causal student with Self-Forcing.

    accelerate launch examples/train_self_forcing.py --config examples/configs/self_forcing/digits.yaml

The student generates chunk by chunk over a key-value cache, in training as it will when streaming; teacher and critic
judge the whole clip, as in DMD2 (Huang et al. 2025). Start from a causal student made by train_kd.py.
"""

from fv_distill import methods, training
from fv_distill.config import parse_run_config
from fv_distill.console import exit_on_user_error


def main() -> None:
    # The packages above load torch on first use, so that --help and mistakes in the config answer at once.
    config, command_line = parse_run_config(__doc__, method_target="fv_distill.methods.SelfForcingMethod")
    with exit_on_user_error(debug=command_line.debug):
        accelerator = training.build_accelerator(config, dry_run=command_line.dry_run)
        dataset = training.build_dataset(config)

        # Together, since roles may share a network.
        models = training.build_models(config, ["student", "teacher", "critic"])
        method = methods.SelfForcingMethod(models, methods.SelfForcingOptions(**config.method.options))
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
