"""Networks that diffusers lacks."""

from fv_distill._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "block_causal": ["ChunkLayout", "FrameMask", "masked_attention", "visible_history"],
        "longcat": ["LongCatVideoTransformer3DModel"],
        "matrixgame2": ["MatrixGame2Transformer3DModel"],
        "wan_causal": ["CausalWanTransformer3DModel"],
    },
)
