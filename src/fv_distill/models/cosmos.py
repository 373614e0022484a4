"""Cosmos-Predict2.5, and Cosmos-Predict2 Video2World, over diffusers' `CosmosTransformer3DModel`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from diffusers import CosmosTransformer3DModel
from diffusers.models.transformers import transformer_cosmos
from torch import Tensor, nn

from fv_distill.schedules import flow

from . import clean_frames
from .base import ModelBase
from .conditioning import Conditioning
from .cosmos_encoders import PIPELINES, CosmosEncoders
from .latent_checks import check_clip_shape
from .pretrained import read_pipeline_class, read_vae_factors
from .prompt_file import read_prompt_file

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
# The noise level that the pipelines tell the network of given frames (`conditional_frame_timestep`).
_CONDITION_SIGMA = 1e-4


class CosmosModel(ModelBase):
    """The network's output is the velocity and its timestep is sigma itself, which may differ between frames.

    It also reads which frames are given (the condition mask) and which pixels are padding (none: clips have one size).
    Predict2's pipeline writes the same network in EDM's terms: with s = sigma / (1 - sigma) its input c_in (x0 + s eps)
    is our x_t, and its x0 = c_skip (x0 + s eps) + c_out F is x_t - sigma F, so that F is the velocity.

    Args:
        transformer: the network.
        directory: see `ModelBase`.
        fps: frames per second that the positions along T are scaled by; None is what the pipeline passes: no scaling
            for Predict2.5, 16 for Predict2.
        condition_frames: the number of a clip's first latent frames that are given (Image2World 1, Video2World 2)
            instead of generated; 0 is Text2World.
        prompt_embeddings: a safetensors file with an embedding `[L, D]` under each prompt's text, read instead of
            running the text encoder; it has to hold the negative prompt and, under caption dropout, the empty one.
        kwargs: see `ModelBase`.
    """

    network_class = CosmosTransformer3DModel
    encoders_class = CosmosEncoders
    gives_frames_in_place = True
    lora_presets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": _ATTENTION,
        "all": (*_ATTENTION, *_FEED_FORWARD),
        # With the embedder of time, the modulation, the projection of the text (Predict2.5) and the output.
        "linear": (*_ATTENTION, *_FEED_FORWARD, "linear_1", "linear_2", "crossattn_proj.0", "proj_out"),
    }

    def __init__(
        self,
        transformer: nn.Module,
        *,
        directory: str | Path,
        fps: float | None = None,
        condition_frames: int = 0,
        prompt_embeddings: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(transformer, directory=directory, **kwargs)
        self.network_config = cast(Any, transformer).config
        self.pads_before_encoding = bool(self.network_config.use_crossattn_projection)
        self.temporal_factor, _ = read_vae_factors(self.directory)
        self._set_options(fps=fps, condition_frames=condition_frames, prompt_embeddings=prompt_embeddings)

    def _set_options(self, *, fps: float | None, condition_frames: int, prompt_embeddings: str | None) -> None:
        if fps is not None and fps <= 0:
            raise ValueError(f"fps={fps:g} must be positive")
        self.fps = fps if fps is not None or self.pads_before_encoding else 16.0
        self.condition_frames = self.fixed_given_frames = clean_frames.check_condition_frames(condition_frames)
        self.given_prompts = {} if prompt_embeddings is None else read_prompt_file(prompt_embeddings)

    @classmethod
    def check_network(cls, network_config: Any, directory: Path) -> None:
        """See `ModelBase.check_network`."""
        name = read_pipeline_class(directory)
        if name not in PIPELINES:
            raise ValueError(
                f"{directory} is a {name}; of Cosmos, Predict2.5 and Predict2 Video2World are handled "
                f"({', '.join(PIPELINES)})"
            )
        if network_config.concat_padding_mask and not hasattr(transformer_cosmos, "transforms"):
            raise ValueError(
                f"{directory}: diffusers' CosmosTransformer3DModel needs torchvision; install fv_distill[cosmos], in "
                "the build that fits torch"
            )
        if network_config.in_channels != network_config.out_channels + 1:
            raise ValueError(
                f"{directory}: in_channels={network_config.in_channels} are not the latents and a condition mask "
                f"({network_config.out_channels + 1})"
            )

    def predict_velocity(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See `ModelBase.predict_velocity`; at given frames it is the one that leads to them."""
        assert conditioning.text is not None, "Cosmos has no network without text; see required_channels"
        batch, _, frames, height, width = x_t.shape
        latents, levels = x_t, flow.per_frame(sigma, x_t)
        mask = torch.zeros(batch, 1, frames, height, width, dtype=self.dtype, device=x_t.device)
        # Without them (`cfg_uncond.image: drop`) the network generates all frames.
        given = conditioning.extras.get(clean_frames.COLUMN) if self.condition_frames else None
        if given is not None:
            latents, levels = clean_frames.put_in_place(x_t, sigma, given, level=_CONDITION_SIGMA)
            mask[:, :, : self.condition_frames] = 1
        (velocity,) = self.call_network(
            hidden_states=latents.to(self.dtype),
            timestep=levels[:, None, :, None, None],
            encoder_hidden_states=conditioning.text.to(self.dtype),
            fps=self.fps,
            condition_mask=mask,
            padding_mask=torch.zeros(1, 1, height, width, dtype=self.dtype, device=x_t.device),
            return_dict=False,
        )
        velocity = velocity.float()
        return velocity if given is None else clean_frames.lead_to(given, x_t, sigma, velocity)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """See `ModelBase.encode_prompts`; embeddings that were given are not made again."""
        if not prompts or any(prompt not in self.given_prompts for prompt in prompts):
            self.check_prompts(prompts)
            return super().encode_prompts(prompts)
        width = next(iter(self.given_prompts.values())).shape[-1]
        text = torch.zeros(len(prompts), self.text_length, width)
        mask = torch.zeros(len(prompts), self.text_length, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            embedding = self.given_prompts[prompt]
            self.check_text(embedding.shape)
            text[row, : len(embedding)], mask[row, : len(embedding)] = embedding, True
        return Conditioning(text.to(self.device), mask.to(self.device))

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """See `ModelBase.check_prompts`: an embedding that is given, or a text encoder to make it."""
        missing = [prompt for prompt in prompts if prompt not in self.given_prompts]
        if missing and not (self.directory / "text_encoder" / "config.json").is_file():
            raise ValueError(
                f"there is no embedding of the prompt {missing[0]!r}, which guidance or caption dropout needs: "
                f"{self.directory} has no text encoder, and zeros are no text that Cosmos was trained on. Give the "
                "prompt's embedding in models.student.prompt_embeddings, a directory with a text encoder, or switch "
                "guidance (scale 1) and training.data.caption_dropout (0) off"
            )

    def check_unconditional_text(self, policy: str) -> None:
        """See `ModelBase.check_unconditional_text`."""
        if policy in ("zero", "drop"):
            raise ValueError(
                f"{policy}, but Cosmos was not trained on {'zeros' if policy == 'zero' else 'no text at all'}; use "
                "negative_prompt, with a real negative embedding"
            )

    def sampling_arguments(self, guidance_scale: float | None) -> dict[str, Any]:
        """See `ModelBase.sampling_arguments`; the pipelines' scale is `cond + w (cond - uncond)`, ours is w + 1."""
        if guidance_scale is None or guidance_scale == 1:
            return super().sampling_arguments(guidance_scale)
        return {"guidance_scale": guidance_scale - 1}

    def text_width(self, encoder_width: int) -> int:
        """See `ModelBase.text_width`; Predict2.5's text is all layers of the encoder side by side."""
        config = self.network_config
        return int(config.crossattn_proj_in_channels if config.use_crossattn_projection else config.text_embed_dim)

    def check_latent_shape(self, shape: Sequence[int], *, num_frames: int | None = None) -> None:
        """See `ModelBase.check_latent_shape`: channels, patch divisibility, 4k + 1 frames, frames to generate."""
        config = self.network_config
        check_clip_shape(
            shape,
            channels=config.out_channels,
            patch_size=config.patch_size,
            temporal_factor=self.temporal_factor,
            num_frames=num_frames,
            directory=self.directory,
        )
        clean_frames.check_condition_frames(self.condition_frames, shape[1])

    def check_text(self, shape: Sequence[int]) -> None:
        """See `ModelBase.check_text`; Predict2.5's has no padding that could be put on later."""
        width = self.text_width(0)
        if shape[-1] != width:
            raise ValueError(
                f"text embeddings of shape {tuple(shape)} don't fit {self.directory}, whose text is {width} wide; "
                "encode the captions with this model's own text encoder"
            )
        if self.pads_before_encoding and shape[0] != self.text_length:
            raise ValueError(
                f"text embeddings of shape {tuple(shape)} don't have the {self.text_length} tokens of "
                "training.data.text_length: Predict2.5 pads prompts before it encodes them, and attends to the "
                "padding; set text_length to what the captions were padded to (512 in the pipeline)"
            )

    def check_conditions(self, shapes: Mapping[str, Sequence[int]], latent_shape: Sequence[int]) -> None:
        """See `ModelBase.check_conditions`."""
        super().check_conditions(shapes, latent_shape)
        clean_frames.check_clean_column(shapes, latent_shape, self.condition_frames)

    def _conditioning(self, batch: Mapping[str, Any]) -> Conditioning:
        conditioning = super()._conditioning(batch)
        return clean_frames.give_frames(conditioning, batch, self.condition_frames, self.normalize_latents)
