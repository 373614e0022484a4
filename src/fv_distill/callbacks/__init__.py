"""Hooks of a training run."""

from fv_distill._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "base": ["Callback", "CallbackDict"],
        "ema": ["EMACallback"],
        "grad_clip": ["GradNormClipCallback"],
        "nan_guard": ["NaNGuardCallback"],
        "profiler": ["ProfilerCallback"],
        "throughput": ["ThroughputCallback"],
        "validation": ["ValidationCallback"],
    },
)
