"""A trained student as a diffusers directory."""

from fv_distill._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "convert": ["convert", "load_role_weights"],
        "diffusers_dir": ["export_diffusers_directory"],
        "scheduler": ["few_step_scheduler"],
    },
)
