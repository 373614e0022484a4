"""From clips and captions to the parquet rows that training reads, and a look at such rows."""

from fv_distill._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "options": ["PreprocessOptions"],
        "run": ["preprocess"],
        "summary": ["Summary"],
        "decode": ["BadClipError", "Clip", "ClipFormat", "decode_clip"],
        "buckets": ["choose_bucket", "make_buckets", "parse_size"],
    },
)
