"""`fv-distill report`: one self-contained HTML page about a run. Needs neither torch nor a network."""

from fv_distill._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, {"page": ["write_report"]})
