"""Training rows: the parquet schema, the loader and the embedded digits."""

from fv_distill._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "digits": ["CAPTIONS", "DigitClips", "digit_images", "sample_clips"],
        "loader": ["BatchPlan", "build_loader"],
        "parquet": ["ParquetDataset"],
        "schema": ["DataError", "ParquetSchemaError", "check_schema", "write_rows"],
    },
)
