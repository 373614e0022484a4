"""What a run will take: memory of a process, network calls, arithmetic and time, from shapes alone."""

from fv_distill._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "estimate": ["Clip", "Estimate", "make_estimate"],
        "layout": ["Layout", "read_layout"],
        "report": ["as_json", "print_estimate"],
    },
)
