"""Compare a student with its teacher, or with real clips, on the same prompts and the same noise."""

from fv_distill._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "run": ["Evaluation", "evaluate"],
        "measure": ["Row"],
        "clips": ["Clip", "ClipStore"],
        "frechet": ["frechet_distance", "principal_components"],
        "metrics": ["brightness", "contrast", "diversity", "flicker", "motion", "mse", "psnr", "ssim"],
    },
)
