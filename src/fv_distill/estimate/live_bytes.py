"""How many bytes are alive while code runs on meta tensors, and what they are."""

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fv_distill.models.quantization import stored_tensors

ACTIVATIONS = "activations"


class LiveBytes(TorchDispatchMode):
    """Counts each storage from the operation that made it until nobody holds it.

    Args:
        known: tensors that are accounted for elsewhere, such as weights.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._known = {inner.untyped_storage()._cdata for tensor in known for inner in stored_tensors(tensor)}
        self._alive: dict[int, tuple[int, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(value, Tensor):
                for inner in stored_tensors(value):
                    self._add(inner)
        return result

    def mark(self, tensor: Tensor, name: str) -> None:
        """Say what a tensor is; everything else counts as activations."""
        key = tensor.untyped_storage()._cdata
        if key in self._alive:
            size, before = self._alive[key]
            self._alive[key] = (size, name)
            self.now[before] -= size
            self.now[name] += size
            if self.now.total() == self.peak.total():
                self.peak = Counter(self.now)

    def start_segment(self) -> Counter[str]:
        """Begin to look for a new peak; the one before is returned."""
        peak, self.peak = self.peak, Counter(self.now)
        return peak

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or key in self._known:
            return
        self._alive[key] = (storage.nbytes(), ACTIVATIONS)
        self.now[ACTIVATIONS] += storage.nbytes()
        if self.now.total() > self.peak.total():
            self.peak = Counter(self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        size, name = self._alive.pop(key)
        self.now[name] -= size
