"""Which rows a step trains on, and the micro-batches made of them.

Both are pure functions of the seed and the step: nothing needs saving, a resumed run goes on with the rows that an
uninterrupted one would have seen, and a global batch doesn't depend on how it is split.
"""

import functools
import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fv_distill.data.buckets import batch_of_step, bucket_permutation
from fv_distill.data.parquet import ParquetDataset, Row, all_finite, batch_dtype
from fv_distill.data.schema import DataError
from fv_distill.rng import SampleRng, derive_seed, generator_for

TEXT = "text_embedding"
# Bytes; torch's for tensors on a CPU.
_ALIGNMENT = 64


@dataclass(frozen=True)
class BatchPlan:
    """The rows of every step.

    Each epoch is a permutation of the rows by (seed, epoch). Step k (from 0) takes the k-th slice of G rows of their
    endless concatenation, G = micro_batch_size * accumulation_steps * world_size. A rank owns a contiguous part of the
    slice, and a micro-batch a contiguous part of that. G may be larger than the data set.

    Where rows have several shapes, each bucket of rows of one shape has such a concatenation of its own, and a step
    takes a slice of one of them; see `batch_of_step`. So the shapes within a global batch are always equal.

    Attributes:
        buckets: `ParquetDataset.buckets`; None for rows of one shape.
    """

    seed: int
    num_rows: int
    micro_batch_size: int
    accumulation_steps: int
    world_size: int
    rank: int
    buckets: Sequence[np.ndarray[Any, Any]] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.num_rows < 1:
            raise DataError("training.data.data_path: the data set is empty")
        if self.micro_batch_size < 1:
            raise ValueError(f"training.data.train_batch_size: {self.micro_batch_size} must be at least 1")
        if self.accumulation_steps < 1:
            raise ValueError(f"training.loop.gradient_accumulation_steps: {self.accumulation_steps} must be at least 1")
        assert 0 <= self.rank < self.world_size, f"rank {self.rank} of {self.world_size}"
        assert self.buckets is None or sum(map(len, self.buckets)) == self.num_rows, "every row is in one bucket"

    @property
    def global_batch_size(self) -> int:
        """Rows per optimisation step over all ranks."""
        return self.micro_batch_size * self.accumulation_steps * self.world_size

    def micro_batches(self, step: int) -> list[list[tuple[int, int]]]:
        """This rank's (row, index in the global batch) pairs of `step`, counted from 0, one list per micro-batch."""
        per_rank = self.micro_batch_size * self.accumulation_steps
        first = self.rank * per_rank
        pairs = list(zip(self._rows(step, first, per_rank), range(first, first + per_rank), strict=True))
        return [pairs[i : i + self.micro_batch_size] for i in range(0, per_rank, self.micro_batch_size)]

    def _rows(self, step: int, first: int, count: int) -> list[int]:
        """The rows [first, first + count) of a step's global batch."""
        size = self.global_batch_size
        if self.buckets is None or len(self.buckets) == 1:
            order = functools.partial(_permutation, self.seed, num_rows=self.num_rows)
            return _stream(order, self.num_rows, step * size + first, count)
        sizes = tuple(map(len, self.buckets))
        bucket, batch = batch_of_step(step, seed=self.seed, bucket_sizes=sizes, batch_size=size)
        order = functools.partial(bucket_permutation, self.seed, bucket=bucket, num_rows=sizes[bucket])
        return self.buckets[bucket][_stream(order, sizes[bucket], batch * size + first, count)].tolist()


def _stream(order: Callable[[int], Tensor], num_rows: int, start: int, count: int) -> list[int]:
    """What is at the positions [start, start + count) of the concatenation of all epochs' orders."""
    rows: list[int] = []
    while len(rows) < count:
        epoch, offset = divmod(start + len(rows), num_rows)
        rows.extend(order(epoch)[offset : offset + count - len(rows)].tolist())
    return rows


# Two, as a batch may straddle the end of an epoch.
@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_rows: int) -> Tensor:
    return torch.randperm(num_rows, generator=generator_for(seed, "data_order", epoch))


@dataclass(frozen=True)
class StepLoader:
    """Iterates over steps; every item is the list of one step's micro-batches. See `build_loader`."""

    loader: DataLoader[Any]
    num_steps: int
    accumulation_steps: int

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        step: list[dict[str, Any]] = []
        for item in self.loader:
            # DataLoader wraps an exception raised in a worker into another one whose message is a traceback.
            if isinstance(item, DataError):
                raise item
            step.append(item)
            if len(step) == self.accumulation_steps:
                yield step
                step = []
        assert not step, "the plan gives whole steps"


def build_loader(
    dataset: ParquetDataset,
    plan: BatchPlan,
    *,
    start_step: int,
    num_steps: int,
    text_length: int,
    caption_dropout: float,
    seed: int,
    num_workers: int = 0,
) -> StepLoader:
    """The micro-batches of the steps [start_step, start_step + num_steps), counted from 0.

    Args:
        dataset: the rows.
        plan: which of them each step takes.
        start_step: the number of steps already done.
        num_steps: steps to go.
        text_length: tokens that texts are padded to.
        caption_dropout: probability in [0, 1] that a sample is marked in `caption_dropped`, drawn per sample with
            `SampleRng` (stream "caption_dropout", steps counted from 1 as everywhere in training).
        seed: of the dropout.
        num_workers: processes that read ahead; 0 reads in this one.

    Returns:
        Per step a list of micro-batches: dicts with "text_embedding" `[B, text_length, D]` and the other tensors
        `[B, ...]` (floating ones fp32), "text_mask" bool `[B, text_length]`, "caption" and "sample_index" (lists of B),
        "caption_dropped" bool `[B]`, and "num_bad_rows" (how many of the rows stand in for bad ones).

    Raises:
        ValueError: for a probability outside [0, 1] or a size that is not positive.
        DataError: while iterating, for a bad row, a text longer than `text_length`, or unlike shapes in a batch.
    """
    if not 0.0 <= caption_dropout <= 1.0:
        raise ValueError(f"training.data.caption_dropout: {caption_dropout} is not in [0, 1]")
    if text_length < 1:
        raise ValueError(f"training.data.text_length: {text_length} must be at least 1")
    if num_workers < 0:
        raise ValueError(f"training.data.num_workers: {num_workers} must not be negative")
    assert plan.num_rows == len(dataset), f"the plan is for {plan.num_rows} rows, the data set has {len(dataset)}"
    steps = range(start_step, start_step + max(0, num_steps))
    loader = DataLoader(
        _MicroBatches(dataset, text_length=text_length, caption_dropout=caption_dropout, seed=seed),
        batch_sampler=_Sampler(plan, steps),
        collate_fn=_identity,
        num_workers=num_workers,
        worker_init_fn=_leave_signals_to_the_run,
        pin_memory=torch.cuda.is_available(),
        # Its own, as an iterator draws the workers' seeds from it: the global generator must stay untouched.
        generator=torch.Generator().manual_seed(derive_seed(seed, "data_workers")),
    )
    return StepLoader(loader, len(steps), plan.accumulation_steps)


@dataclass(frozen=True)
class _Sampler:
    """Micro-batches as lists of (step, row, index in the global batch)."""

    plan: BatchPlan
    steps: range

    def __len__(self) -> int:
        return len(self.steps) * self.plan.accumulation_steps

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for step in self.steps:
            for pairs in self.plan.micro_batches(step):
                yield [(step, row, index) for row, index in pairs]


class BatchMemory:
    """fp32 tensors whose memory is used again once nobody holds them: fresh pages cost more than the copy into them.

    A tensor from NumPy memory, and every view of it, holds a reference to the array; an array that only the pool
    refers to is free. So a batch that is kept is never overwritten. At most as much is held as was in use at once.

    The memory starts where torch's own does, at multiples of 64 bytes: MKL adds in another order elsewhere, and a run
    that goes on in a new process would differ in its last digits (seen with 2 x 24 by 24 x 144, MKL 2024.2).
    """

    def __init__(self) -> None:
        self._arrays: dict[tuple[int, ...], list[np.ndarray[Any, Any]]] = {}

    def empty(self, shape: Sequence[int]) -> Tensor:
        """An uninitialised fp32 tensor."""
        arrays = self._arrays.setdefault(tuple(shape), [])
        for index in range(len(arrays)):
            # The references of the list and of the call itself.
            if sys.getrefcount(arrays[index]) == 2:
                return torch.from_numpy(arrays[index])
        arrays.append(_aligned_array(shape))
        return torch.from_numpy(arrays[-1])


def _aligned_array(shape: Sequence[int]) -> np.ndarray[Any, Any]:
    size = math.prod(shape)
    memory = np.empty(size + _ALIGNMENT // 4, dtype=np.float32)
    start = -memory.ctypes.data % _ALIGNMENT // 4
    return memory[start : start + size].reshape(tuple(shape))


class _MicroBatches(Dataset[Any]):
    """Reads and collates a whole micro-batch at once, so that stored bytes are copied only once, into the batch."""

    def __init__(self, dataset: ParquetDataset, *, text_length: int, caption_dropout: float, seed: int) -> None:
        self.dataset = dataset
        self.text_length = text_length
        self.caption_dropout = caption_dropout
        self.seed = seed
        self.memory = BatchMemory()

    def __getitems__(self, keys: Sequence[tuple[int, int, int]]) -> dict[str, Any] | DataError:
        step, indices = keys[0][0], [index for _, _, index in keys]
        try:
            batch = self._read([row for _, row, _ in keys])
        except DataError as error:
            return error
        draws = SampleRng(self.seed, step + 1, indices).uniform("caption_dropout")
        return batch | {"caption_dropped": draws < self.caption_dropout, "sample_index": indices}

    def _read(self, rows: Sequence[int]) -> dict[str, Any]:
        def collated(*, check_values: bool) -> dict[str, Any]:
            read = [self.dataset.read(row, check_values=check_values) for row in rows]
            return collate(read, text_length=self.text_length, memory=self.memory)

        try:
            return collated(check_values=False)
        except _NotFiniteError:
            # Rare: only now is it worth a pass of its own to find the row, and to report or replace it.
            return collated(check_values=True)


class _NotFiniteError(Exception):
    """A value that was copied into a batch is not finite."""


def _identity(batch: Any) -> Any:
    return batch


def collate(rows: Sequence[Row], *, text_length: int, memory: BatchMemory) -> dict[str, Any]:
    """Stack rows to a batch and pad their texts with zeros.

    Raises:
        DataError: for a text longer than `text_length`, or rows whose tensors differ in name or shape.
        _NotFiniteError: for a value that is not finite.
    """
    first = rows[0]
    batch: dict[str, Any] = {}
    for name in first.tensors:
        for row in rows[1:]:
            _check_alike(name, first, row)
        values = [row.tensors[name] for row in rows]
        if name == TEXT:
            for row in rows:
                _check_text_fits(row, text_length)
            batch[TEXT], batch["text_mask"] = _pad(values, text_length, memory)
        else:
            batch[name] = _stack(values, memory)
    captions = [row.scalars["caption"] for row in rows]
    return batch | {"caption": captions, "num_bad_rows": sum(row.replaced for row in rows)}


def _stack(values: Sequence[Tensor], memory: BatchMemory) -> Tensor:
    shape, dtype = (len(values), *values[0].shape), batch_dtype(values[0].dtype)
    stacked = memory.empty(shape) if dtype == torch.float32 else torch.empty(shape, dtype=dtype)
    for target, value in zip(stacked, values, strict=True):
        _copy(target, value)
    return stacked


def _copy(target: Tensor, value: Tensor) -> None:
    """Copy, then check the copy: it is in the processor's cache and on large pages, as the mapped file is not."""
    target.copy_(value)
    if target.is_floating_point() and not all_finite(target):
        raise _NotFiniteError


def _pad(texts: Sequence[Tensor], length: int, memory: BatchMemory) -> tuple[Tensor, Tensor]:
    padded = memory.empty((len(texts), length, texts[0].shape[1]))
    for target, text in zip(padded, texts, strict=True):
        _copy(target[: len(text)], text)
        target[len(text) :].zero_()
    mask = torch.arange(length) < torch.tensor([[len(text)] for text in texts])
    return padded, mask


def _check_alike(name: str, first: Row, row: Row) -> None:
    skip = 1 if name == TEXT else 0
    ours, theirs = first.tensors[name].shape, row.tensors[name].shape
    if ours[skip:] != theirs[skip:]:
        raise DataError(
            f"{first.place} and {row.place} are in one batch, but their {name} have the shapes {list(ours)} and "
            f"{list(theirs)}; give the BatchPlan the data set's buckets, or train on data of one shape"
        )


def _check_text_fits(row: Row, text_length: int) -> None:
    num_tokens = row.tensors[TEXT].shape[0]
    if num_tokens > text_length:
        raise DataError(
            f"{row.place}, column {TEXT}: {num_tokens} tokens are more than training.data.text_length={text_length}; "
            f"set text_length to at least {num_tokens}, or preprocess with shorter captions"
        )


def _leave_signals_to_the_run(_: int) -> None:
    """A terminal or a scheduler signals the whole process group; workers have to live until the run has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
