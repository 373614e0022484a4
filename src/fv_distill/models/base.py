"""`ModelBase`: one role's network and all that is needed to call it with normalised latents and a sigma."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from fv_distill.schedules import flow
from fv_distill.schedules.timesteps import score_sigma

from .conditioning import ACTION_COLUMNS, IMAGE_COLUMNS, Conditioning, PreparedBatch


class ModelBase(ABC):
    """An adapter that gives every network one signature: `(x_t, sigma, conditioning) -> velocity`.

    Latents are `[B, C, T, H, W]`, normalised; sigma is fp32 `[B]` or per latent frame `[B, T]`, 1 being pure noise.

    Args:
        transformer: the network.
        directory: the diffusers pipeline directory it comes from, where encoders, VAE and scheduler are found.
        flow_shift: the shift of the family's noise schedule.
        trainable: whether an optimizer will update the network.
        negative_prompt: what guidance's unconditional pass reads.
        text_length: the number of tokens that text embeddings are padded to.
    """

    required_channels: ClassVar[tuple[str, ...]] = ("text",)

    def __init__(
        self,
        transformer: nn.Module,
        *,
        directory: str | Path,
        flow_shift: float,
        trainable: bool = False,
        negative_prompt: str = "",
        text_length: int = 512,
    ) -> None:
        if flow_shift <= 0:
            raise ValueError(f"flow_shift={flow_shift:g} must be positive; 1 means no shift")
        self.transformer = transformer
        self.directory = Path(directory)
        self.flow_shift = flow_shift
        self.trainable = trainable
        self.negative_prompt = negative_prompt
        self.text_length = text_length
        # diffusers' property, not the first parameter: some of a bf16 network's modules stay in fp32.
        self.dtype: torch.dtype = cast(Any, transformer).dtype
        self._prompts: dict[str, Conditioning] = {}
        transformer.requires_grad_(trainable).train(trainable)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.transformer.parameters()).device

    # What a family defines

    @abstractmethod
    def predict_velocity(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The velocity `eps - x0` at `x_t`, fp32, in the shape of `x_t`."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Text conditioning `[len(prompts), text_length, D]`; the encoder is loaded, used and freed."""

    @abstractmethod
    def normalize_latents(self, latents: Tensor) -> Tensor:
        """Raw VAE latents to what the network is trained on."""

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Normalised latents to video `[B, 3, F, H, W]` in [0, 1], fp32; the VAE is loaded, used and freed."""

    @abstractmethod
    def check_latent_shape(self, shape: Sequence[int], *, num_frames: int | None = None) -> None:
        """Raise a `ValueError` that names the fix if latents `[C, T, H, W]` can't be fed to the network."""

    @abstractmethod
    def check_text(self, shape: Sequence[int]) -> None:
        """Raise a `ValueError` that names the fix if text embeddings `[L, D]` can't be fed to the network."""

    # What follows from it

    def predict_x0(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The clean latents that the velocity at `x_t` points to, fp32."""
        return flow.velocity_to_x0(x_t, self.predict_velocity(x_t, sigma, conditioning), sigma)

    def predict_x0_guided(
        self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning, unconditional: Conditioning | None, scale: float
    ) -> Tensor:
        """`predict_x0` under classifier-free guidance; scale 1 runs no unconditional pass."""
        conditional = self.predict_x0(x_t, sigma, conditioning)
        if scale == 1:
            return conditional
        assert unconditional is not None, "guidance other than 1 needs an unconditional conditioning"
        return flow.guide(conditional, self.predict_x0(x_t, sigma, unconditional), scale)

    def add_noise(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """`(1 - sigma) x0 + sigma eps`, fp32."""
        return flow.add_noise(x0, noise, sigma)

    def shift_and_clamp_timestep(self, u: Tensor, *, minimum: float = 0.02, maximum: float = 0.98) -> Tensor:
        """A uniform draw `u` as a sigma: shifted by the family's flow shift, then clamped."""
        return score_sigma(u, shift=self.flow_shift, minimum=minimum, maximum=maximum)

    def prepare_batch(
        self, batch: Mapping[str, Any], *, latents_source: Literal["data", "zeros"] = "data"
    ) -> PreparedBatch:
        """Normalised latents and conditioning of a collated batch.

        Args:
            batch: as the data loader makes it, on the network's device.
            latents_source: "data" reads the clip; "zeros" only takes its shape, which is all that a method needs that
                starts from noise (text-only rows then have the shape `training.data.latent_shape`).

        Raises:
            ValueError: if the clip is missing, or its shape does not fit the network.
        """
        text = batch["text_embedding"]
        if "vae_latent" in batch:
            shape = tuple(batch["vae_latent"].shape[1:])
        elif latents_source == "zeros" and "latent_shape" in batch:
            shape = tuple(batch["latent_shape"])
        else:
            raise ValueError(
                "the rows of training.data.data_path hold text only; "
                + (
                    "set training.data.latent_shape to the [C, T, H, W] that the student shall generate"
                    if latents_source == "zeros"
                    else "this method trains on clips and needs the column vae_latent"
                )
            )
        self.check_latent_shape(shape)
        if latents_source == "data":
            latents = self.normalize_latents(batch["vae_latent"])
        else:
            latents = torch.zeros((text.shape[0], *shape), device=text.device)
        return PreparedBatch(latents, self._conditioning(batch))

    def negative_conditioning(self) -> Conditioning:
        """The negative prompt's conditioning, batch size 1."""
        return self.prompt_conditioning(self.negative_prompt)

    def prompt_conditioning(self, prompt: str) -> Conditioning:
        """One prompt's conditioning, batch size 1, encoded once and kept on the network's device."""
        if prompt not in self._prompts:
            self._prompts[prompt] = self.encode_prompts([prompt])
        return self._prompts[prompt]

    def _conditioning(self, batch: Mapping[str, Any]) -> Conditioning:
        text, mask = batch["text_embedding"].float(), batch["text_mask"]
        dropped = batch.get("caption_dropped")
        if dropped is not None and bool(dropped.any()):
            empty = self.prompt_conditioning("")
            assert empty.text is not None and empty.text_mask is not None
            text = torch.where(dropped[:, None, None], empty.text, text)
            mask = torch.where(dropped[:, None], empty.text_mask, mask)
        extras = {name: batch[name] for name in IMAGE_COLUMNS + ACTION_COLUMNS if name in batch}
        return Conditioning(text, mask, extras)
