"""A run as one typed, checked YAML file."""

from fv_distill._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "instantiate": ["instantiate", "resolve_target"],
        "load": ["dump_run_config", "load_run_config", "parse_run_config"],
        "schema": ["ConfigError", "RunConfig"],
    },
)
