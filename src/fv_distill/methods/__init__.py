"""Which role minimises what, and when."""

from fv_distill._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "base": ["LossTerm", "SigmaErrors", "TrainingMethod"],
        "calls": ["NetworkCall"],
        "dfsft": ["DiffusionForcingSFTMethod"],
        "dmd2": ["DMD2Method"],
        "finetune": ["FineTuneMethod"],
        "kd": ["KDCausalMethod", "KDMethod"],
        "options": [
            "CfgUncondOptions",
            "DMD2Options",
            "DiffusionForcingSFTOptions",
            "FineTuneOptions",
            "KDCausalOptions",
            "KDOptions",
            "MethodOptions",
            "OPTIONS_BY_TARGET",
            "SelfForcingOptions",
            "TrajectoryOptions",
        ],
        "self_forcing": ["SelfForcingMethod"],
    },
)
