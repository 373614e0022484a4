"""Rows of unlike shapes: which may share a batch, and which batch of which bucket a step takes.

All is read from the shape columns, without a look at the tensors, and all follows from the seed and the step.
"""

import bisect
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from fv_distill.data.schema import parse_dtype
from fv_distill.rng import generator_for

Shapes = tuple[tuple[int, ...], ...]
"""Of one row: the shapes of its tensors, in the order of their names; the text's is left out, as texts are padded."""

# A text's tokens and a clip's frames, height and width differ between rows; the model decides on the rest.
FIXED_DIMENSIONS = {"text_embedding": slice(1, None), "vae_latent": slice(0, 1)}
_NOTHING_FIXED = slice(0, 0)


def fits(name: str, shape: Sequence[int], reference: Sequence[int]) -> bool:
    """Whether a tensor of `shape` may be in one data set with one of shape `reference`."""
    fixed = FIXED_DIMENSIONS.get(name, _NOTHING_FIXED)
    return len(shape) == len(reference) and tuple(shape[fixed]) == tuple(reference[fixed])


def read_shapes(table: pa.Table, tensors: Sequence[str], reference: Mapping[str, Sequence[int]]) -> list[Shapes]:
    """The shapes of every row of a data set.

    A row whose columns contradict each other is given the reference's: reading it will tell what is wrong with it, and
    a good row takes its place where that is wanted.

    Args:
        table: with the tensors' three columns each.
        tensors: their names, the text not among them.
        reference: the shapes of a good row.
    """
    columns = [_column_shapes(table, name, tuple(reference[name])) for name in tensors]
    # Equal shapes are one object: a million rows shall not take more than a list of them.
    known: dict[Shapes, Shapes] = {}
    return [known.setdefault(shapes, shapes) for shapes in zip(*columns, strict=True)] if columns else [()] * len(table)


def _column_shapes(table: pa.Table, name: str, reference: tuple[int, ...]) -> list[tuple[int, ...]]:
    lengths = pc.binary_length(table.column(f"{name}_bytes")).to_pylist()
    dtypes = table.column(f"{name}_dtype").to_pylist()
    widths = {dtype: _item_size(dtype) for dtype in set(dtypes)}
    shapes = []
    for shape, length, dtype in zip(table.column(f"{name}_shape").to_pylist(), lengths, dtypes, strict=True):
        found = tuple(shape or ())
        is_whole = all(size is not None and size > 0 for size in found) and length == widths[dtype] * _product(found)
        shapes.append(found if is_whole and fits(name, found, reference) else reference)
    return shapes


def _product(sizes: Sequence[int]) -> int:
    return functools.reduce(lambda product, size: product * size, sizes, 1)


def _item_size(dtype: str | None) -> int:
    try:
        return parse_dtype(dtype or "").itemsize
    except ValueError:
        return 0


def group_rows(shapes: Sequence[Any]) -> list[np.ndarray]:
    """Row numbers of each distinct value, in the order in which the values come first."""
    numbers: dict[Any, int] = {}
    labels = np.fromiter((numbers.setdefault(shape, len(numbers)) for shape in shapes), dtype=np.int64)
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.cumsum(np.bincount(labels, minlength=len(numbers)))[:-1])


def batch_of_step(step: int, *, seed: int, bucket_sizes: tuple[int, ...], batch_size: int) -> tuple[int, int]:
    """The bucket of a step's global batch, and which batch of that bucket it is, counted from 0.

    Each bucket is an endless stream of rows, epoch after epoch. Up to the end of epoch e the batches that bucket b has
    filled by then have been taken, floor(e n_b / batch_size) of them, so all rows are seen equally often; within an
    epoch the order of the batches is a permutation by (seed, epoch).

    Args:
        step: counted from 0.
        seed: of the run.
        bucket_sizes: rows of each bucket.
        batch_size: rows of a global batch.
    """
    # Rounding down loses less than one batch for each bucket.
    enough = -(-(step + 1 + len(bucket_sizes)) * batch_size // sum(bucket_sizes)) + 1
    epochs = range(1, enough + 1)
    epoch = bisect.bisect_right(epochs, step, key=lambda end: sum(_filled(end, bucket_sizes, batch_size)))
    place = step - sum(_filled(epoch, bucket_sizes, batch_size))
    position = int(_epoch_order(seed, epoch, bucket_sizes, batch_size)[place])
    before, after = (_filled(end, bucket_sizes, batch_size) for end in (epoch, epoch + 1))
    for bucket, (first, end) in enumerate(zip(before, after, strict=True)):
        if position < end - first:
            return bucket, first + position
        position -= end - first
    raise AssertionError("the position is one of the epoch's batches")


def _filled(epochs: int, bucket_sizes: tuple[int, ...], batch_size: int) -> list[int]:
    """Batches that each bucket has filled after so many epochs."""
    return [epochs * size // batch_size for size in bucket_sizes]


@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, bucket_sizes: tuple[int, ...], batch_size: int) -> Tensor:
    count = sum(_filled(epoch + 1, bucket_sizes, batch_size)) - sum(_filled(epoch, bucket_sizes, batch_size))
    return torch.randperm(count, generator=generator_for(seed, "bucket_order", epoch))


# A few epochs of several buckets: those that are worked through side by side.
@functools.lru_cache(maxsize=16)
def bucket_permutation(seed: int, epoch: int, bucket: int, num_rows: int) -> Tensor:
    """The order of a bucket's rows in an epoch."""
    return torch.randperm(num_rows, generator=generator_for(seed, "data_order", epoch, bucket))
