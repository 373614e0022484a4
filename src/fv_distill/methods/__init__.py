"""Which role minimises what, and when."""

from fv_distill._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "base": ["LossTerm", "TrainingMethod"],
        "dmd2": ["DMD2Method"],
        "finetune": ["FineTuneMethod"],
        "options": [
            "CfgUncondOptions",
            "DMD2Options",
            "FineTuneOptions",
            "MethodOptions",
            "OPTIONS_BY_TARGET",
            "SelfForcingOptions",
        ],
        "self_forcing": ["SelfForcingMethod"],
    },
)
