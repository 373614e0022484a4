"""Matrix-Game 2: clips that go on from an image as mouse and keyboard say."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from .base import ModelBase
from .conditioning import Conditioning
from .latent_checks import check_clip_shape
from .matrixgame2_encoders import MatrixGame2Encoders
from .pretrained import load_component_config
from .transformers.matrixgame2 import MASK_CHANNELS, MatrixGame2Transformer3DModel, beside_first_frame

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_ACTION = ("t_qkv", "proj_mouse", "mouse_attn_q", "keyboard_attn_kv", "proj_keyboard")
_FEED_FORWARD = ("ffn.net.0.proj", "ffn.net.2")


class MatrixGame2Model(ModelBase):
    """Matrix-Game 2's network output is the velocity itself and its timestep is 1000 sigma; it reads no text.

    Its conditions are data columns: `first_frame_latent` `[C, T, H, W]`, the normalised latents of a video that is the
    first frame and then grey; `clip_feature` `[L, D]`, CLIP's tokens of the first frame; `mouse_cond` `[F, 2]` and
    `keyboard_cond` `[F, K]` of the clip's video frames. The mouse is left out where the network has none. A channel
    that is dropped (`cfg_uncond`) is not there for the network at all: no mask of a given frame, no image tokens, no
    action modules.

    The arguments are those of `ModelBase`; use `MatrixGame2Model.from_pretrained` for a directory that
    `fv-distill convert-matrixgame2` made.
    """

    network_class = MatrixGame2Transformer3DModel
    encoders_class = MatrixGame2Encoders
    required_channels = ()
    reads_text = False
    lora_presets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": _ATTENTION,
        "action": _ACTION,
        "all": (*_ATTENTION, *_ACTION, *_FEED_FORWARD),
    }

    def __init__(self, transformer: nn.Module, *, directory: str | Path, **kwargs: Any) -> None:
        super().__init__(transformer, directory=directory, **kwargs)
        self.network_config = cast(Any, transformer).config
        self.actions = cast(MatrixGame2Transformer3DModel, transformer).actions
        self.temporal_factor = self.actions.vae_time_compression_ratio

    @classmethod
    def check_network(cls, network_config: Any, directory: Path) -> None:
        """See `ModelBase.check_network`."""
        latents = network_config.out_channels
        if network_config.in_channels != 2 * latents + MASK_CHANNELS:
            raise ValueError(
                f"{directory} has a network of {network_config.in_channels} input channels, which are not {latents} "
                f"noisy ones, a mask of {MASK_CHANNELS} and {latents} of the first frame"
            )

    def predict_velocity(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See `ModelBase.predict_velocity`."""
        return self.run_network(self.beside_first_frame(x_t, conditioning), sigma.float(), conditioning)

    def run_network(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, **options: Any) -> Tensor:
        """The velocity, fp32.

        Args:
            latents: see `beside_first_frame`.
            sigma: one for each clip, or for each of the latents' frames.
            conditioning: of the batch.
            options: further arguments of the network.
        """
        extras = conditioning.extras
        image, mouse, keyboard = (extras.get(name) for name in ("clip_feature", "mouse_cond", "keyboard_cond"))
        (velocity,) = self.call_network(
            hidden_states=latents.to(self.dtype),
            timestep=1000 * sigma,
            encoder_hidden_states_image=None if image is None else image.to(self.dtype),
            mouse_cond=mouse,
            keyboard_cond=keyboard,
            return_dict=False,
            **options,
        )
        return velocity.float()

    def beside_first_frame(self, x_t: Tensor, conditioning: Conditioning, *, start_frame: int = 0) -> Tensor:
        """The network's input for latents `[B, C, T, H, W]` that begin at `start_frame` of the clip."""
        return beside_first_frame(x_t, conditioning.extras.get("first_frame_latent"), start_frame=start_frame)

    def check_latent_shape(self, shape: Sequence[int], *, num_frames: int | None = None) -> None:
        """See `ModelBase.check_latent_shape`."""
        check_clip_shape(
            shape,
            channels=self.network_config.out_channels,
            patch_size=self.network_config.patch_size,
            temporal_factor=self.temporal_factor,
            num_frames=num_frames,
            directory=self.directory,
        )

    def check_text(self, shape: Sequence[int]) -> None:
        """See `ModelBase.check_text`; there is no text to check."""

    def condition_shapes(self, latent_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """See `ModelBase.condition_shapes`."""
        frames = self.temporal_factor * (latent_shape[1] - 1) + 1
        encoder = load_component_config(self.directory, "image_encoder")
        tokens = (encoder["image_size"] // encoder["patch_size"]) ** 2 + 1
        shapes: dict[str, tuple[int, ...]] = {
            "first_frame_latent": tuple(latent_shape),
            "clip_feature": (tokens, self.network_config.image_dim),
        }
        if self.actions.blocks and self.actions.enable_mouse:
            shapes["mouse_cond"] = (frames, self.actions.mouse_dim_in)
        if self.actions.blocks and self.actions.enable_keyboard:
            shapes["keyboard_cond"] = (frames, self.actions.keyboard_dim_in)
        return shapes

    def check_conditions(self, shapes: Mapping[str, Sequence[int]], latent_shape: Sequence[int]) -> None:
        """See `ModelBase.check_conditions`; actions of more video frames than the clip has are cut off."""
        needed = self.condition_shapes(latent_shape)
        found = dict(shapes)
        for name in ("mouse_cond", "keyboard_cond"):
            if name in needed and name in found and len(found[name]) == 2 and found[name][0] > needed[name][0]:
                found[name] = (needed[name][0], found[name][1])
        super().check_conditions(found, latent_shape)
