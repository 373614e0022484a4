"""`ModelBase`: one role's network and all that is needed to call it with normalised latents and a sigma."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from fv_distill.lora import AdapterSwitch
from fv_distill.schedules import flow
from fv_distill.schedules.timesteps import score_sigma

from .clean_frames import COLUMN
from .conditioning import (
    ACTION_COLUMNS,
    IMAGE_COLUMNS,
    TEXT_COLUMNS,
    Conditioning,
    PreparedBatch,
    check_condition_shapes,
)
from .encoders import Encoders
from .pretrained import load_network, read_flow_shift, read_latent_statistics, resolve_directory
from .role_network import RoleNetwork


class ModelBase(RoleNetwork, ABC):
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

    network_class: ClassVar[type[Any]]
    encoders_class: ClassVar[type[Encoders]]
    required_channels: ClassVar[tuple[str, ...]] = ("text",)
    # Whether the network reads text at all; where none does, rows need hold none.
    reads_text: ClassVar[bool] = True
    # Latent frames that the network takes as given whatever a batch says: roles have to agree on them.
    fixed_given_frames: int = 0
    # Whether the frames of `first_frame_latent` take the place of a clip's first noisy ones.
    gives_frames_in_place: bool = False
    # Whether `predict_velocity` takes sigma `[B, T]`, a noise level per latent frame.
    takes_sigma_per_frame: ClassVar[bool] = True
    # Whether the network embeds time in its timestep's type, which then has to be that of its weights.
    embeds_time_in_own_dtype: ClassVar[bool] = False
    # Whether parts of the network hand float32 to layers of its own type, which FSDP2's cast weights don't take.
    mixes_types: ClassVar[bool] = False
    # Whether some of the network's weights have no part in its output, so that no gradient ever reaches them.
    has_unused_parameters: ClassVar[bool] = False
    # Whether the network can be called with shapes alone, as `fv-distill estimate` does.
    runs_on_meta: ClassVar[bool] = True

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
        super().__init__(transformer, trainable=trainable)
        self.directory = Path(directory)
        self.flow_shift = flow_shift
        self.negative_prompt = negative_prompt
        self.text_length = text_length
        # Whether batches come with captions dropped, in whose place the empty prompt goes.
        self.drops_captions = True
        self.latents_mean, self.latents_std = self.read_statistics(self.directory)
        self._prompts: dict[str, Conditioning] = {}

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
        **options: Any,
    ) -> Self:
        """Load a pipeline directory or Hub repository.

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
            options: the family's own, arguments of its class.

        Raises:
            FileNotFoundError: if there is no such model.
            ValueError: for weights that don't fit, a network that is not the family's, an unknown dtype or attention
                backend.
        """
        directory = resolve_directory(init_from)
        transformer = load_network(
            cls.network_class,
            directory,
            check=cls.check_network,
            dtype=dtype,
            weights=weights,
            gradient_checkpointing=gradient_checkpointing,
            attention_backend=attention_backend,
            subfolder=cls.component_of(options),
        )
        return cls(
            transformer,
            directory=directory,
            flow_shift=read_flow_shift(directory) if flow_shift is None else flow_shift,
            trainable=trainable,
            negative_prompt=negative_prompt,
            text_length=text_length,
            **options,
        )

    @classmethod
    def component_of(cls, options: Mapping[str, Any]) -> str:
        """The pipeline's name of the network that the family's own options choose."""
        return "transformer"

    @classmethod
    def read_statistics(cls, directory: Path) -> tuple[Tensor, Tensor]:
        """Mean and deviation of raw latents, each broadcastable to `[B, C, T, H, W]`."""
        return read_latent_statistics(directory)

    @classmethod
    def check_network(cls, network_config: Any, directory: Path) -> None:
        """Raise a `ValueError` if the network of this config isn't one that the adapter calls rightly."""

    @classmethod
    def on_base(cls, base: "ModelBase", *, flow_shift: float | None = None, **kwargs: Any) -> Self:
        """A role on the frozen network of another, which `add_lora` then sets apart; all such before any adapter.

        Args:
            base: the role whose network it is.
            flow_shift: None is the base's.
            kwargs: further arguments of the class, without `transformer`, `directory` and `trainable`.

        Raises:
            ValueError: if the base's network is trained itself or already has adapters.
        """
        if base.trainable or base.adapter is not None:
            raise ValueError(
                "the base of other roles has to stay as it is: it can neither be trainable nor have a LoRA"
            )
        if base.switch is None:
            base.switch = AdapterSwitch(base.transformer, resting=None)
        model = cls(
            base.transformer,
            directory=base.directory,
            flow_shift=base.flow_shift if flow_shift is None else flow_shift,
            **kwargs,
        )
        model.switch, model.is_on_base = base.switch, True
        return model

    # What a family defines

    @abstractmethod
    def predict_velocity(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The velocity `eps - x0` at `x_t`, fp32, in the shape of `x_t`."""

    @abstractmethod
    def check_latent_shape(self, shape: Sequence[int], *, num_frames: int | None = None) -> None:
        """Raise a `ValueError` that names the fix if latents `[C, T, H, W]` can't be fed to the network."""

    @abstractmethod
    def check_text(self, shape: Sequence[int]) -> None:
        """Raise a `ValueError` that names the fix if text embeddings `[L, D]` can't be fed to the network."""

    def condition_shapes(self, latent_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """The data columns beside text that the network needs, with their shapes for latents `[C, T, H, W]`."""
        return {}

    def check_conditions(self, shapes: Mapping[str, Sequence[int]], latent_shape: Sequence[int]) -> None:
        """Raise a `ValueError` that names the fix if a row's tensors, here their shapes by column, lack a condition."""
        owner = f"{type(self).__name__} of {self.directory}"
        check_condition_shapes(shapes, self.condition_shapes(latent_shape), owner=owner)

    @property
    def pipeline_config(self) -> dict[str, Any]:
        """What the `model_index.json` of an export says otherwise than the directory's own."""
        return {}

    def check_context_parallel(self, degree: int, latent_shape: Sequence[int]) -> None:
        """Raise a `ValueError` unless `degree` processes can share the tokens of latents `[C, T, H, W]`.

        A family that can, overrides this; its network has to have diffusers' `enable_parallelism`.
        """
        raise ValueError(f"{type(self).__name__} can't share a clip's tokens between processes")

    def check_unconditional_text(self, policy: str) -> None:
        """Raise a `ValueError` unless guidance's unconditional pass can have such a text; see `UncondPolicy.text`."""
        if policy == "drop" and "text" in self.required_channels:
            raise ValueError(f"drop, but {type(self).__name__} can't run without text; use negative_prompt or zero")

    def check_unconditional_image(self, policy: str) -> None:
        """Raise a `ValueError` unless guidance's unconditional pass can have this image; see `UncondPolicy.image`."""

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise a `ValueError` that names the fix if `encode_prompts` can't encode one of these; loads nothing."""

    def sampling_arguments(self, guidance_scale: float | None) -> dict[str, Any]:
        """Guidance of this scale as arguments of the family's diffusers pipeline, and what else of its call is its own.

        A scale of None is the pipeline's own.
        """
        return {} if guidance_scale is None else {"guidance_scale": guidance_scale}

    def text_width(self, encoder_width: int) -> int:
        """The width of text embeddings that a text encoder of hidden size `encoder_width` makes for this family."""
        return encoder_width

    # What follows from it

    def normalize_latents(self, latents: Tensor) -> Tensor:
        """Raw VAE latents to what the network is trained on, `(latents - mean) / std`, fp32."""
        return (latents.float() - self.latents_mean.to(latents.device)) / self.latents_std.to(latents.device)

    def raw_latents(self, latents: Tensor) -> Tensor:
        """What `normalize_latents` made its argument from, fp32."""
        return latents.float() * self.latents_std.to(latents.device) + self.latents_mean.to(latents.device)

    def encoders(self) -> Encoders:
        """The family's text encoders and VAE, to be loaded on the network's device and freed with the object."""
        return self.encoders_class(self.directory, device=self.device, dtype=self.dtype, text_length=self.text_length)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Text conditioning `[len(prompts), text_length, D]`; the encoder is loaded, used and freed."""
        return self.encoders().encode_prompts(prompts)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Normalised latents to video `[B, 3, F, H, W]` in [0, 1], fp32; the VAE is loaded, used and freed."""
        return self.encoders().decode(self.raw_latents(latents))

    def predict_x0(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The clean latents that the velocity at `x_t` points to, fp32."""
        return flow.velocity_to_x0(x_t, self.predict_velocity(x_t, sigma, conditioning), sigma)

    def predict_x0_guided(
        self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning, unconditional: Conditioning | None, scale: float
    ) -> Tensor:
        """`predict_x0` under classifier-free guidance; scale 1 runs no unconditional pass.

        Frames that are given stay what they are, whatever the unconditional pass is given.
        """
        conditional = self.predict_x0(x_t, sigma, conditioning)
        if scale == 1:
            return conditional
        assert unconditional is not None, "guidance other than 1 needs an unconditional conditioning"
        guided = flow.guide(conditional, self.predict_x0(x_t, sigma, unconditional), scale)
        if not (self.gives_frames_in_place and COLUMN in conditioning.extras):
            return guided
        given = conditioning.extras[COLUMN].shape[2]
        return torch.cat([conditional[:, :, :given], guided[:, :, given:]], dim=2)

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
            ValueError: if the clip or a condition is missing, or its shape does not fit the network.
        """
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
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        self.check_conditions({name: tuple(value.shape[1:]) for name, value in tensors.items()}, shape)
        if latents_source == "data":
            latents = self.normalize_latents(batch["vae_latent"])
        else:
            latents = torch.zeros((_batch_size(batch), *shape), device=self.device)
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
        extras = {name: batch[name] for name in TEXT_COLUMNS + IMAGE_COLUMNS + ACTION_COLUMNS if name in batch}
        if not self.reads_text:
            return Conditioning(None, None, extras)
        text, mask = batch["text_embedding"].float(), batch["text_mask"]
        dropped = batch.get("caption_dropped")
        if dropped is not None and bool(dropped.any()):
            empty = self.prompt_conditioning("")
            assert empty.text is not None and empty.text_mask is not None
            text = torch.where(dropped[:, None, None], empty.text, text)
            mask = torch.where(dropped[:, None], empty.text_mask, mask)
            for name, value in empty.extras.items():
                rows = dropped.view(-1, *[1] * (value.ndim - 1))
                extras[name] = torch.where(rows, value.to(extras[name].dtype), extras[name])
        return Conditioning(text, mask, extras)


def _batch_size(batch: Mapping[str, Any]) -> int:
    return next(value.shape[0] for value in batch.values() if isinstance(value, Tensor))
