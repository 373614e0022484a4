"""Wan 2.1 text-to-video over diffusers' `WanTransformer3DModel`."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn

from .base import ModelBase
from .conditioning import Conditioning
from .pretrained import (
    load_component_config,
    load_weights_override,
    parse_dtype,
    read_flow_shift,
    resolve_directory,
)


class WanModel(ModelBase):
    """Wan's network output is the velocity itself; its timestep is 1000 sigma and its text is padded with zeros.

    The arguments are those of `ModelBase`; use `WanModel.from_pretrained` for a diffusers directory.
    """

    lora_presets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": ("to_q", "to_k", "to_v", "to_out.0"),
        "all": ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"),
        # With the embedders of time and text, the modulation and the output.
        "linear": (
            *("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"),
            *("linear_1", "linear_2", "time_proj", "proj_out"),
        ),
    }

    def __init__(self, transformer: nn.Module, *, directory: str | Path, **kwargs: Any) -> None:
        super().__init__(transformer, directory=directory, **kwargs)
        self.network_config = cast(Any, transformer).config
        vae = load_component_config(self.directory, "vae")
        self.temporal_factor = int(vae["scale_factor_temporal"])
        self.latents_mean = torch.tensor(vae["latents_mean"]).view(1, -1, 1, 1, 1)
        self.latents_std = torch.tensor(vae["latents_std"]).view(1, -1, 1, 1, 1)

    @classmethod
    def from_pretrained(
        cls,
        init_from: str,
        *,
        trainable: bool = False,
        flow_shift: float | None = None,
        dtype: str | torch.dtype = "float32",
        weights: str | None = None,
        gradient_checkpointing: bool = False,
        attention_backend: str | None = None,
        negative_prompt: str = "",
        text_length: int = 512,
    ) -> "WanModel":
        """Load a Wan pipeline directory or Hub repository.

        Args:
            init_from: a local diffusers directory or a Hub id `owner/name`.
            trainable: whether this role is trained.
            flow_shift: the noise schedule's shift; None reads it from the directory's scheduler.
            dtype: of the weights; trainable roles want float32.
            weights: a safetensors file in diffusers' key names that replaces the transformer's weights.
            gradient_checkpointing: recompute activations in the backward pass.
            attention_backend: a diffusers attention backend, for instance "flash" or "native".
            negative_prompt: see `ModelBase`.
            text_length: see `ModelBase`.

        Raises:
            FileNotFoundError: if there is no such model.
            ValueError: for weights that don't fit, an image-to-video network, an unknown dtype or attention backend.
        """
        directory = resolve_directory(init_from)
        transformer = load_text_to_video(
            WanTransformer3DModel,
            directory,
            dtype=dtype,
            weights=weights,
            gradient_checkpointing=gradient_checkpointing,
            attention_backend=attention_backend,
        )
        return cls(
            transformer,
            directory=directory,
            flow_shift=read_flow_shift(directory) if flow_shift is None else flow_shift,
            trainable=trainable,
            negative_prompt=negative_prompt,
            text_length=text_length,
        )

    def predict_velocity(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See `ModelBase.predict_velocity`; a sigma per latent frame is spread over the frame's tokens."""
        assert conditioning.text is not None, "Wan has no network without text; see required_channels"
        timestep = 1000 * sigma.float()
        if timestep.ndim == 2:
            _, patch_height, patch_width = self.network_config.patch_size
            tokens_per_frame = (x_t.shape[3] // patch_height) * (x_t.shape[4] // patch_width)
            timestep = timestep.repeat_interleave(tokens_per_frame, dim=1)
        (velocity,) = self.call_network(
            hidden_states=x_t.to(self.dtype),
            timestep=timestep,
            encoder_hidden_states=conditioning.text.to(self.dtype),
            return_dict=False,
        )
        return velocity.float()

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """See `ModelBase.encode_prompts`; cleaning, tokenising and padding are `WanPipeline`'s own."""
        pipeline = WanPipeline.from_pretrained(self.directory, transformer=None, vae=None, dtype=self.dtype)
        pipeline.text_encoder.to(self.device)
        text, _ = pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=self.text_length, device=self.device
        )
        # The pipeline pads with zeros and gives no mask; an encoded token is never exactly zero.
        return Conditioning(text.float(), text.abs().sum(dim=-1) > 0)

    def normalize_latents(self, latents: Tensor) -> Tensor:
        """`(latents - mean) / std` with the VAE's per-channel statistics, fp32."""
        return (latents.float() - self.latents_mean.to(latents.device)) / self.latents_std.to(latents.device)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """See `ModelBase.decode_latents`."""
        vae = self._load_vae(latents.device)
        video = vae.decode(self._raw_latents(latents).to(vae.dtype), return_dict=False)[0]
        return (video.float() / 2 + 0.5).clamp(0, 1)

    def _load_vae(self, device: torch.device) -> Any:
        return AutoencoderKLWan.from_pretrained(self.directory, subfolder="vae", dtype=self.dtype).to(device)

    def _raw_latents(self, latents: Tensor) -> Tensor:
        return latents.float() * self.latents_std.to(latents.device) + self.latents_mean.to(latents.device)

    def check_latent_shape(self, shape: Sequence[int], *, num_frames: int | None = None) -> None:
        """See `ModelBase.check_latent_shape`: channels, patch divisibility and 4k + 1 frames."""
        shown = tuple(shape)
        if len(shown) != 4:
            raise ValueError(f"latents have shape {shown}; expected [C, T, H, W]")
        channels, frames, height, width = shown
        if channels != self.network_config.in_channels:
            raise ValueError(
                f"latents {shown} have {channels} channels but {self.directory} takes "
                f"{self.network_config.in_channels}; encode the data with this model's own VAE"
            )
        for name, size, patch in zip(
            ("T", "H", "W"), (frames, height, width), self.network_config.patch_size, strict=True
        ):
            if size < patch or size % patch:
                raise ValueError(
                    f"latents {shown}: {name}={size} does not divide by the patch size {patch}; crop the data"
                )
        factor = self.temporal_factor
        if num_frames is not None and num_frames != (frames - 1) * factor + 1:
            raise ValueError(
                f"a clip of {num_frames} frames can't have {frames} latent frames: this VAE turns {factor}k+1 frames "
                f"into k+1, so {frames} latent frames are {(frames - 1) * factor + 1} frames; re-encode the clip"
            )

    def check_context_parallel(self, degree: int, latent_shape: Sequence[int]) -> None:
        """See `ModelBase.check_context_parallel`: the processes get equal shares of heads and of tokens."""
        heads = self.network_config.num_attention_heads
        if heads % degree:
            raise ValueError(f"{self.directory} has {heads} attention heads, which {degree} processes can't share")
        tokens = math.prod(latent_shape[1:]) // math.prod(self.network_config.patch_size)
        if tokens % degree:
            raise ValueError(
                f"latents {tuple(latent_shape)} have {tokens} tokens, which {degree} processes can't share; crop the "
                "data or choose another degree"
            )

    def check_text(self, shape: Sequence[int]) -> None:
        """See `ModelBase.check_text`."""
        if shape[-1] != self.network_config.text_dim:
            raise ValueError(
                f"text embeddings of shape {tuple(shape)} don't fit {self.directory}, whose text_dim is "
                f"{self.network_config.text_dim}; encode the captions with this model's own text encoder"
            )


def load_text_to_video(
    network_class: type[WanTransformer3DModel],
    directory: Path,
    *,
    dtype: str | torch.dtype,
    weights: str | None,
    gradient_checkpointing: bool,
    attention_backend: str | None,
) -> nn.Module:
    """A directory's network as `network_class`; arguments and errors as in `WanModel.from_pretrained`.

    Under `torch.device("meta")` its config is all that is read: the shapes without the weights.
    """
    is_meta = torch.get_default_device().type == "meta"
    transformer: Any = (
        _without_weights(network_class, directory, parse_dtype(dtype))
        if is_meta
        else network_class.from_pretrained(directory, subfolder="transformer", dtype=parse_dtype(dtype))
    )
    if transformer.config.image_dim is not None or transformer.config.in_channels != transformer.config.out_channels:
        raise ValueError(f"{directory} is an image-to-video Wan; only Wan 2.1 text-to-video is handled")
    if weights is not None and not is_meta:
        load_weights_override(transformer, weights)
    if gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if attention_backend is not None:
        transformer.set_attention_backend(attention_backend)
    return transformer


def _without_weights(network_class: type[WanTransformer3DModel], directory: Path, dtype: torch.dtype) -> Any:
    """The network on the meta device, its parameters in the types that `from_pretrained` would give them."""
    load_component_config(directory, "transformer")
    network: Any = network_class.from_config(network_class.load_config(directory, subfolder="transformer"))
    kept_in_fp32 = network_class._keep_in_fp32_modules or []
    for name, parameter in network.named_parameters():
        if not any(part in name.split(".") for part in kept_in_fp32):
            parameter.data = parameter.data.to(dtype)
    return network.eval()
