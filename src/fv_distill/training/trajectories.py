"""The cache of a teacher's sampling paths: made once, by all processes, and trained on as rows like any others.

A path is a pure function of the config and its index, and every file of paths is written at once under its final name.
So a killed run goes on where it was, with any number of processes, and ends with the same files.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from fv_distill.config.schema import ModelConfig, RunConfig
from fv_distill.console import console
from fv_distill.data.loader import BatchMemory, collate
from fv_distill.data.parquet import ParquetDataset
from fv_distill.data.schema import REQUIRED_TENSORS, SCALARS, write_rows
from fv_distill.methods.options import OPTIONS_BY_TARGET, TrajectoryOptions
from fv_distill.models.base import ModelBase
from fv_distill.models.conditioning import UncondPolicy, unconditional
from fv_distill.models.pipeline_index import network_folder
from fv_distill.rng import generator_for
from fv_distill.rollouts.ode import STATES, TIMESTEPS, ode_trajectory, trajectory_sigmas

from .sharding import prepare_alone

METADATA_FILE = "trajectories.json"
_TARGET_KEY = "models.teacher._target_"
_OPTIONS_KEY = "models.teacher (its adapter's own keys)"

# Of each weights file so much from both ends tells one teacher from another; hashing all of 14B takes minutes.
_HASHED_BYTES = 2**20


class TrajectoryCache:
    """The paths that a config describes, and how far they have been made.

    Args:
        config: of the run, whose method has `TrajectoryOptions`.
        dataset: the rows that paths are made from.

    Raises:
        ValueError: if the directory holds paths of something else; key, both values and the fix are named.
    """

    def __init__(self, config: RunConfig, dataset: ParquetDataset) -> None:
        options = trajectory_options(config)
        assert options is not None and options.teacher_path_cache is not None, "checked by the caller"
        self.config = config
        self.options = options
        self.directory = Path(options.teacher_path_cache)
        self.dataset = dataset
        self.num_paths = len(dataset) * options.trajectories_per_row
        self.num_files = -(-self.num_paths // options.trajectories_per_file)
        self._check()

    @property
    def missing(self) -> list[int]:
        """Indices of the files that are still to be made."""
        return [index for index in range(self.num_files) if not self._file(index).is_file()]

    def make(self, accelerator: Accelerator, teacher: ModelBase) -> None:
        """Make what is missing, each process its share.

        Raises:
            ValueError: if the teacher is for some noise levels only, or guidance has nothing to lead away from.
        """
        scale = self.options.teacher_guidance_scale
        if scale != 1 and not teacher.reads_text:
            raise ValueError(
                f"method.teacher_guidance_scale={scale:g}, but {type(teacher).__name__} reads no text, and paths are "
                "guided away from a negative prompt; set it to 1"
            )
        if teacher.is_expert:
            raise ValueError(
                "models.teacher is an expert for a part of the noise levels, and sampling paths go through all of "
                "them; distil two experts with DMD2Method"
            )
        if accelerator.is_main_process:
            self._write_metadata()
        missing = self.missing
        accelerator.wait_for_everyone()
        # Processes call it a different number of times, so it can't be sharded.
        prepare_alone(accelerator, teacher, self.config.models["teacher"].placement)
        if teacher.drops_captions:
            teacher.prompt_conditioning("")
        share = missing[accelerator.process_index :: accelerator.num_processes]
        for count, index in enumerate(share, start=1):
            write_rows(self._file(index), self._rows(index, teacher, accelerator.device))
            if accelerator.is_main_process:
                done = self.num_files - len(missing) + min(len(missing), count * accelerator.num_processes)
                console.print(f"teacher paths: {done} of {self.num_files} files", highlight=False)
        accelerator.wait_for_everyone()

    def open(self) -> ParquetDataset:
        """The paths as rows."""
        assert not self.missing, "made before they are read"
        data = self.config.training.data
        return ParquetDataset(
            self.directory, required=self.dataset.required, on_bad_row=data.on_bad_row, cache_dir=data.cache_dir
        )

    def _rows(self, file: int, teacher: ModelBase, device: torch.device) -> Iterator[dict[str, Any]]:
        size = self.options.trajectories_per_file
        paths = range(file * size, min((file + 1) * size, self.num_paths))
        for first in range(paths.start, paths.stop, self.options.trajectory_batch_size):
            chunk = paths[first - paths.start :][: self.options.trajectory_batch_size]
            for part in self._of_one_shape(chunk):
                yield from self._batch(part, teacher, device)

    def _of_one_shape(self, paths: range) -> Iterator[range]:
        """The paths cut where the next one's row has other shapes."""
        for _, group in itertools.groupby(paths, key=lambda path: self.dataset.shapes_of(path % len(self.dataset))):
            members = list(group)
            yield range(members[0], members[-1] + 1)

    def _batch(self, paths: range, teacher: ModelBase, device: torch.device) -> Iterator[dict[str, Any]]:
        data, options = self.config.training.data, self.options
        rows = [self.dataset.read(path % len(self.dataset)) for path in paths]
        batch = collate(rows, text_length=data.text_length, memory=BatchMemory())
        tensors = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
        if data.latent_shape is not None:
            tensors["latent_shape"] = data.latent_shape  # type: ignore[assignment]  # as the trainer hands it to models
        prepared = teacher.prepare_batch(tensors, latents_source="zeros")
        noise = torch.stack([self._noise(path, prepared.latents.shape[1:]) for path in paths]).to(device)
        levels = trajectory_sigmas(
            options.sigmas, num_steps=options.teacher_inference_steps, flow_shift=teacher.flow_shift
        )
        kept = levels if options.store_all_states else options.sigmas
        states = ode_trajectory(
            teacher,
            noise,
            prepared.conditioning,
            levels,
            keep=kept,
            unconditional=unconditional(prepared.conditioning, UncondPolicy(), teacher.negative_conditioning())
            if options.teacher_guidance_scale != 1
            else None,
            guidance_scale=options.teacher_guidance_scale,
        ).cpu()
        for row, path in zip(rows, states, strict=True):
            yield {
                **{name: value for name, value in row.scalars.items() if name in SCALARS},
                # A network without text has none in its rows.
                **dict.fromkeys(REQUIRED_TENSORS),
                **{name: value for name, value in row.tensors.items() if name != "vae_latent"},
                STATES: path,
                TIMESTEPS: 1000 * torch.tensor(kept),
            }

    def _noise(self, path: int, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator_for(self.config.training.seed, "trajectory", path))

    def _file(self, index: int) -> Path:
        return self.directory / f"paths-{index:06d}.parquet"

    def _describe(self) -> dict[str, Any]:
        """What the paths depend on, by the key that it follows from."""
        data = self.config.training.data
        facts = self.options.model_dump(mode="json", exclude={"teacher_path_cache", "trajectory_batch_size"})
        path_keys = set(TrajectoryOptions.model_fields) - {"student_sample_steps"}
        described = {f"method.{key}": value for key, value in facts.items() if key in path_keys}
        described |= {
            "training.seed": self.config.training.seed,
            "training.data.data_path": data.model_dump(mode="json")["data_path"],
            "training.data.latent_shape": None if data.latent_shape is None else list(data.latent_shape),
            "rows": len(self.dataset),
        }
        if "teacher" in self.config.models:
            teacher = self.config.models["teacher"]
            described |= {f"models.teacher.{key}": getattr(teacher, key) for key in ("weights", "flow_shift")}
            described["models.teacher.negative_prompt"] = teacher.negative_prompt
            described["models.teacher.init_from"] = teacher.init_from
            described["models.teacher.quantization"] = teacher.quantization
            described[_OPTIONS_KEY] = dict(teacher.model_extra or {})
            described[_TARGET_KEY] = teacher.target
            described["models.teacher (fingerprint of its files)"] = _fingerprint(teacher.init_from)
        return described

    def _check(self) -> None:
        path = self.directory / METADATA_FILE
        if not path.is_file():
            if any(self.directory.glob("*.parquet")):
                raise ValueError(
                    f"method.teacher_path_cache: {self.directory} holds parquet files but no {METADATA_FILE}; give an "
                    "empty directory"
                )
            return
        # Older metadata has no such entries; there was one adapter then, without options.
        older = {
            _TARGET_KEY: ModelConfig.model_fields["target"].default,
            _OPTIONS_KEY: {},
            "models.teacher.quantization": None,
        }
        stored = {**older, **json.loads(path.read_text())}
        for key, value in self._describe().items():
            if stored.get(key) != value:
                raise ValueError(
                    f"method.teacher_path_cache: the paths in {self.directory} were made with {key}="
                    f"{stored.get(key)!r}, but the config has {value!r}; change it back, or give another directory"
                )

    def _write_metadata(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = self.directory / f"{METADATA_FILE}.{os.getpid()}.tmp"
        partial.write_text(json.dumps(self._describe(), indent=2) + "\n")
        partial.replace(self.directory / METADATA_FILE)


def trajectory_options(config: RunConfig) -> TrajectoryOptions | None:
    """The method's options on paths, or None if it doesn't train on any it would make."""
    kind = OPTIONS_BY_TARGET.get(config.method.target)
    if kind is None or not issubclass(kind, TrajectoryOptions):
        return None
    options = kind.model_validate(config.method.options)
    return options if options.teacher_path_cache is not None else None


def _fingerprint(init_from: str) -> str | None:
    """A hash of the transformer's files in a local directory; None for a Hub id, which names its weights itself."""
    directory = Path(init_from).expanduser()
    folder = directory / network_folder(directory)
    if not folder.is_dir():
        return None
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            digest.update(f"{path.name}:{path.stat().st_size}".encode())
            digest.update(file.read(_HASHED_BYTES))
            file.seek(max(0, path.stat().st_size - _HASHED_BYTES))
            digest.update(file.read())
    return digest.hexdigest()
