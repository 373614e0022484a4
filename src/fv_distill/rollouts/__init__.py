"""How a student samples, in training and after it."""

from fv_distill._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "autoregressive": ["Rollout", "StreamingGuidance", "autoregressive_rollout", "store_context", "stream_chunks"],
        "few_step": ["few_step_rollout", "few_step_sample"],
        "ode": ["ode_trajectory", "trajectory_sigmas"],
    },
)
