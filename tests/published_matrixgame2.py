"""Names and shapes of the published Matrix-Game 2 weights, written out from the published configs.

Skywork/Matrix-Game-2.0 on the Hub; the configs are those of github.com/SkyworkAI/Matrix-Game, Matrix-Game-2/configs.
"""

from typing import Any

_ACTION: dict[str, Any] = {
    "enable_keyboard": True,
    "enable_mouse": True,
    "heads_num": 16,
    "hidden_size": 128,
    "img_hidden_size": 1536,
    "keyboard_dim_in": 4,
    "keyboard_hidden_dim": 1024,
    "mouse_dim_in": 2,
    "mouse_hidden_dim": 1024,
    "mouse_qk_dim_list": [8, 28, 28],
    "patch_size": [1, 2, 2],
    "qk_norm": True,
    "qkv_bias": False,
    "rope_dim_list": [8, 28, 28],
    "rope_theta": 256,
    "vae_time_compression_ratio": 4,
    "windows_size": 3,
}
_CONFIG: dict[str, Any] = {
    "_class_name": "CausalWanModel",
    "_diffusers_version": "0.35.0.dev0",
    "dim": 1536,
    "eps": 1e-06,
    "ffn_dim": 8960,
    "freq_dim": 256,
    "in_dim": 36,
    "inject_sample_info": False,
    "model_type": "i2v",
    "num_heads": 12,
    "num_layers": 30,
    "out_dim": 16,
    "sink_size": 0,
    "text_len": 512,
}
_WITHOUT_MOUSE = {key: value for key, value in _ACTION.items() if not key.startswith("mouse_")}
_FIRST_HALF = list(range(15))

CONFIGS: dict[str, dict[str, Any]] = {
    "base_model": {**_CONFIG, "local_attn_size": -1, "action_config": {"blocks": list(range(30)), **_ACTION}},
    "base_distilled_model": {**_CONFIG, "local_attn_size": 6, "action_config": {"blocks": _FIRST_HALF, **_ACTION}},
    "gta_distilled_model": {
        **_CONFIG,
        "local_attn_size": 4,
        "action_config": {"blocks": _FIRST_HALF, **_ACTION, "keyboard_dim_in": 2},
    },
    "templerun_distilled_model": {
        **_CONFIG,
        "local_attn_size": 6,
        "action_config": {"blocks": _FIRST_HALF, **_WITHOUT_MOUSE, "enable_mouse": False, "keyboard_dim_in": 7},
    },
}
"""By the directory of the published repository."""

# CLIP ViT-H/14's tokens.
_IMAGE_DIM = 1280


def published_shapes(config: dict[str, Any], *, image_dim: int = _IMAGE_DIM) -> dict[str, tuple[int, ...]]:
    """Every key of the network that a published config describes, without the `model.` before it in the files."""
    dim = config["dim"]
    shapes: dict[str, tuple[int, ...]] = {"head.modulation": (1, 2, dim)}

    def linear(name: str, outputs: int, inputs: int, *, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    def norm(name: str, size: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (size,)

    shapes["patch_embedding.weight"] = (dim, config["in_dim"], 1, 2, 2)
    shapes["patch_embedding.bias"] = (dim,)
    linear("time_embedding.0", dim, config["freq_dim"])
    linear("time_embedding.2", dim, dim)
    linear("time_projection.1", 6 * dim, dim)
    norm("img_emb.proj.0", image_dim)
    linear("img_emb.proj.1", image_dim, image_dim)
    linear("img_emb.proj.3", dim, image_dim)
    norm("img_emb.proj.4", dim)
    linear("head.head", 4 * config["out_dim"], dim)
    for layer in range(config["num_layers"]):
        block = f"blocks.{layer}"
        shapes[f"{block}.modulation"] = (1, 6, dim)
        for attention in ("self_attn", "cross_attn"):
            for projection in "qkvo":
                linear(f"{block}.{attention}.{projection}", dim, dim)
            shapes[f"{block}.{attention}.norm_q.weight"] = shapes[f"{block}.{attention}.norm_k.weight"] = (dim,)
        norm(f"{block}.norm3", dim)
        linear(f"{block}.ffn.0", config["ffn_dim"], dim)
        linear(f"{block}.ffn.2", dim, config["ffn_dim"])
        action = config["action_config"]
        if layer not in action["blocks"]:
            continue
        module, window = f"{block}.action_model", action["windows_size"] * action["vae_time_compression_ratio"]
        if action["enable_mouse"]:
            size = action["mouse_hidden_dim"]
            linear(f"{module}.mouse_mlp.0", size, action["mouse_dim_in"] * window + dim)
            linear(f"{module}.mouse_mlp.2", size, size)
            norm(f"{module}.mouse_mlp.3", size)
            linear(f"{module}.t_qkv", 3 * size, size, bias=action["qkv_bias"])
            linear(f"{module}.proj_mouse", dim, size, bias=action["qkv_bias"])
            for name in ("img_attn_q_norm", "img_attn_k_norm"):
                shapes[f"{module}.{name}.weight"] = (size // action["heads_num"],)
        size, hidden = action["keyboard_hidden_dim"], action["hidden_size"]
        linear(f"{module}.keyboard_embed.0", hidden, action["keyboard_dim_in"])
        linear(f"{module}.keyboard_embed.2", hidden, hidden)
        linear(f"{module}.mouse_attn_q", size, dim, bias=action["qkv_bias"])
        linear(f"{module}.keyboard_attn_kv", 2 * size, hidden * window, bias=action["qkv_bias"])
        linear(f"{module}.proj_keyboard", dim, size, bias=action["qkv_bias"])
        for name in ("key_attn_q_norm", "key_attn_k_norm"):
            shapes[f"{module}.{name}.weight"] = (size // action["heads_num"],)
    return shapes
