"""Fine-tune a video model with diffusion forcing: every chunk of frames has a noise level of its own.

    accelerate launch examples/train_dfsft.py --config examples/configs/dfsft/digits.yaml

With method.teacher_forcing each chunk sees the clean chunks before it, which makes a many-step causal model.
"""

from fv_distill import methods, training
from fv_distill.config import parse_run_config
from fv_distill.console import exit_on_user_error


def main() -> None:
    # The packages above load torch on first use, so that --help and mistakes in the config answer at once.
    config, command_line = parse_run_config(__doc__, method_target="fv_distill.methods.DiffusionForcingSFTMethod")
    with exit_on_user_error(debug=command_line.debug):
        accelerator = training.build_accelerator(config, dry_run=command_line.dry_run)
        dataset = training.build_dataset(config)

        student = training.build_model(config, "student")
        options = methods.DiffusionForcingSFTOptions(**config.method.options)
        method = methods.DiffusionForcingSFTMethod({"student": student}, options)
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
