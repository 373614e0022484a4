"""Adapters: how a network is called."""

from fv_distill._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "base": ["ModelBase"],
        "causal_base": ["CausalModelBase"],
        "conditioning": ["Conditioning", "PreparedBatch", "UncondPolicy", "unconditional"],
        "cosmos": ["CosmosModel"],
        "hunyuan": ["HunyuanVideoModel"],
        "hunyuan15": ["HunyuanVideo15Model"],
        "hunyuan_image": ["HunyuanVideoImageToVideoModel"],
        "kandinsky5": ["Kandinsky5Model"],
        "kv_cache": ["KVCache"],
        "longcat": ["LongCatVideoModel"],
        "matrixgame2": ["MatrixGame2Model"],
        "matrixgame2_causal": ["CausalMatrixGame2Model"],
        "ltx2": ["LTX2VideoModel"],
        "wan": ["WanModel"],
        "wan_causal": ["CausalWanModel"],
        "wan_image": ["WanImageToVideoModel"],
    },
)
