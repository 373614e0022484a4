"""Noise schedules: pure functions of tensors."""

from fv_distill._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "flow": ["add_noise", "guide", "velocity_target", "velocity_to_noise", "velocity_to_x0", "x0_to_velocity"],
        "shift": ["shift_sigma", "unshift_sigma"],
        "timesteps": [
            "density_sigma",
            "gaussian_timestep_weight",
            "logit_normal_sigma",
            "mode_sigma",
            "score_sigma",
            "uniform_sigma",
            "within_range",
        ],
        "few_step": ["few_step_sigmas"],
    },
)
