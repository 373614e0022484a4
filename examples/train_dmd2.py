"""Distil a video model into a few-step student with DMD2.

    accelerate launch examples/train_dmd2.py --config examples/configs/dmd2/digits.yaml

Three copies of the network take part: the frozen teacher, the student, and a critic that learns the student's own
distribution. The student follows the difference between the two scores at its samples (Yin et al. 2024).
"""

from fv_distill import callbacks, data, export, methods, training
from fv_distill.config import parse_run_config
from fv_distill.console import exit_on_user_error


def main() -> None:
    config, command_line = parse_run_config(__doc__, method_target="fv_distill.methods.DMD2Method")
    with exit_on_user_error(debug=command_line.debug):
        accelerator = training.build_accelerator(config, dry_run=command_line.dry_run)
        options = config.training.data
        dataset = data.ParquetDataset(options.data_path, on_bad_row=options.on_bad_row, cache_dir=options.cache_dir)

        student = training.build_model(config, "student")
        teacher = training.build_model(config, "teacher")
        critic = training.build_model(config, "critic")
        method = methods.DMD2Method(
            {"student": student, "teacher": teacher, "critic": critic},
            methods.DMD2Options(**config.method.options),
        )
        training.check_data_fits(dataset, method, config)

        hooks = callbacks.CallbackDict(
            {name: options.as_kwargs() for name, options in config.callbacks.items()}, config.training
        )
        trainer = training.Trainer(accelerator, method, dataset, config, hooks)
        if command_line.dry_run:
            training.print_dry_run(trainer)
            return
        trainer.train()
        export.export_after_training(trainer)


if __name__ == "__main__":
    main()
