"""A run as one typed, checked YAML file."""

from fv_distill._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "command_line": ["CommandLine", "parse_run_config"],
        "describe": ["describe_keys"],
        "instantiate": ["instantiate", "resolve_target"],
        "load": ["dump_run_config", "load_run_config"],
        "schema": ["ConfigError", "RunConfig"],
    },
)
