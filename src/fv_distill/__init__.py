"""fv_distill: turn slow video-diffusion models into few-step ones."""

from ._lazy import attach

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "callbacks": [],
        "config": [],
        "data": [],
        "evaluation": [],
        "export": [],
        "losses": [],
        "methods": [],
        "models": [],
        "rng": [],
        "rollouts": [],
        "schedules": [],
        "training": [],
    },
)
