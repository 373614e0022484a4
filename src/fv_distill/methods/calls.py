"""What a method calls: the description that an estimate of its cost is made from. Free of torch."""

from dataclasses import dataclass, replace
from typing import Literal

Span = Literal["clip", "clip_after_history", "chunk"]


@dataclass(frozen=True)
class NetworkCall:
    """Forward passes of one role's network that cost the same.

    Attributes:
        role: whose network runs.
        grad: whether the passes build a graph that a backward pass goes through.
        count: how many on one micro-batch; the mean over what is drawn, such as exit steps.
        span: of latent frames: all of a clip at once, the clip behind a clean copy of its frames (teacher forcing), or
            one chunk over a cache.
        start_frame: the latent frame that a chunk starts with.
        guided: whether it is the second, unconditional pass of guidance.
    """

    role: str
    grad: bool = False
    count: float = 1.0
    span: Span = "clip"
    start_frame: int = 0
    guided: bool = False

    def times(self, count: float) -> "NetworkCall":
        """The same passes, `count` times as many."""
        return replace(self, count=self.count * count)
