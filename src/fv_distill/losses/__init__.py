"""What is minimised: pure functions of tensors."""

from fv_distill._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "distribution_matching": ["direction_loss", "dmd_direction", "dmd_loss"],
        "flow_matching": ["errors_by_sigma", "flow_matching_loss"],
        "regression": ["x0_regression_loss"],
    },
)
