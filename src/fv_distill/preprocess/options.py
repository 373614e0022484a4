"""The options of `fv-distill preprocess` as typed, described fields; free of torch, as `--help` reads them."""

from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from fv_distill.config.schema import Section

from .buckets import parse_size

Dtype = Literal["float32", "bfloat16", "float16"]


def _dashed(name: str) -> str:
    return name.replace("_", "-")


class PreprocessOptions(Section):
    """What rows are made of, and how; the names are those of the command line, without its dashes in Python."""

    model_config = ConfigDict(alias_generator=_dashed)

    model: str = Field(description="the diffusers directory or Hub id whose text encoder and VAE encode")
    data: str = Field(
        description="a folder of videos with captions, an HF data set (saved, parquet files, or a Hub id), or a file "
        "of prompts (.txt, .json, .jsonl)"
    )
    output: str = Field(description="the directory of rows; again with the same options goes on where it stopped")
    adapter: str | None = Field(
        None, description="dotted path of a model adapter whose encoders are used; null: by the model's pipeline class"
    )
    split: str = Field("train", description="of an HF data set")
    caption_column: str | None = Field(
        None, description="of an HF data set or of metadata.csv/jsonl; null: caption, text or prompt"
    )
    video_column: str = Field("video", description="of an HF data set; one without it is text-only")
    actions: bool = Field(
        False, description="every clip has mouse [F, 2] and keyboard [F, K] in a .npz or .json of its name"
    )

    num_frames: int = Field(81, ge=1, description="frames of each clip; k times the VAE's temporal factor, plus 1")
    fps: float | None = Field(None, gt=0, description="frames per second to resample to; null: frames as they come")
    resolution: str | None = Field(None, description="one size for all, HxW, such as 480x832")
    buckets: list[str] | None = Field(
        None, description="several sizes, HxW; each clip gets the one whose aspect ratio is nearest"
    )
    max_area: str | None = Field(None, description="buckets of common aspect ratios with at most this area, HxW")
    crop: Literal["center", "letterbox"] = Field(
        "center", description="cut what is over at the sides, or fill what is missing with black"
    )
    clips_per_video: int = Field(1, ge=1, description="up to so many clips that don't overlap, evenly spread")

    text_length: int = Field(512, ge=1, description="tokens that captions are cut off at")
    text_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the text encoder and its embeddings; auto: bfloat16, on a CPU float32"
    )
    vae_dtype: Dtype = Field("float32", description="of the VAE")
    latent_dtype: Dtype = Field("float32", description="of stored latents and image conditions")
    vae_tiling: Literal["auto", "on", "off"] = Field(
        "auto", description="encode in overlapping tiles, which saves memory; auto: above 1280x720 pixels"
    )
    device: str | None = Field(None, description="null: an accelerator where there is one")

    shard_rows: int = Field(64, ge=1, description="rows of a file; a kill loses at most the file in work")
    decode_workers: int = Field(2, ge=1, description="threads that decode while the device encodes, per process")
    clip_timeout: float = Field(300, gt=0, description="seconds after which a clip's decoding is given up")
    overwrite: bool = Field(False, description="remove rows that were made with other options")

    @field_validator("resolution", "max_area")
    @classmethod
    def _is_a_size(cls, value: str | None) -> str | None:
        if value is not None:
            parse_size(value)
        return value

    @field_validator("buckets")
    @classmethod
    def _are_sizes(cls, value: list[str] | None) -> list[str] | None:
        if value is not None:
            if not value:
                raise ValueError("no sizes are given")
            for size in value:
                parse_size(size)
        return value

    @model_validator(mode="after")
    def _one_way_to_choose_sizes(self) -> "PreprocessOptions":
        given = [name for name in ("resolution", "buckets", "max_area") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(_dashed(name) for name in given)} exclude each other; give one of them")
        return self

    def row_facts(self) -> dict[str, Any]:
        """What the rows depend on: all but how and where the work is done."""
        work = {"output", "device", "shard_rows", "decode_workers", "clip_timeout", "overwrite"}
        return self.model_dump(mode="json", exclude=work)
