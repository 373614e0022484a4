"""Pipelines that diffusers lacks."""

from fv_distill._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__, {"longcat": ["LongCatVideoPipeline"], "matrixgame2": ["MatrixGame2Pipeline"]}
)
