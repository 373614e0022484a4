"""Which encoders a pipeline directory has: by its pipeline's class, or by an adapter that is named."""

from pathlib import Path

from fv_distill.config.instantiate import resolve_target
from fv_distill.models.encoders import Encoders
from fv_distill.models.pretrained import read_pipeline_class

ENCODERS_BY_PIPELINE = {
    "Cosmos2VideoToWorldPipeline": "fv_distill.models.cosmos_encoders.CosmosEncoders",
    "Cosmos2_5_PredictBasePipeline": "fv_distill.models.cosmos_encoders.CosmosEncoders",
    "HunyuanVideo15ImageToVideoPipeline": "fv_distill.models.hunyuan15_encoders.HunyuanVideo15Encoders",
    "HunyuanVideo15Pipeline": "fv_distill.models.hunyuan15_encoders.HunyuanVideo15Encoders",
    "HunyuanVideoImageToVideoPipeline": "fv_distill.models.hunyuan_encoders.HunyuanVideoImageEncoders",
    "HunyuanVideoPipeline": "fv_distill.models.hunyuan_encoders.HunyuanVideoEncoders",
    "Kandinsky5I2VPipeline": "fv_distill.models.kandinsky5_encoders.Kandinsky5Encoders",
    "Kandinsky5T2VPipeline": "fv_distill.models.kandinsky5_encoders.Kandinsky5Encoders",
    "LTX2Pipeline": "fv_distill.models.ltx2_encoders.LTX2Encoders",
    "LongCatVideoPipeline": "fv_distill.models.longcat_encoders.LongCatEncoders",
    "MatrixGame2Pipeline": "fv_distill.models.matrixgame2_encoders.MatrixGame2Encoders",
    "WanImageToVideoPipeline": "fv_distill.models.wan_encoders.WanImageEncoders",
    "WanPipeline": "fv_distill.models.wan_encoders.WanEncoders",
}
"""A pipeline's class -> its family's encoders."""


def encoders_class(directory: Path, adapter: str | None) -> type[Encoders]:
    """The encoders of a directory's family.

    Args:
        directory: a pipeline directory.
        adapter: dotted path of a model adapter whose `encoders_class` is taken instead.

    Raises:
        ValueError: for a pipeline of no known family.
        TypeError: for an adapter that is none.
        ImportError: for a path at which there is nothing.
    """
    if adapter is not None:
        found = resolve_target(adapter)
        if not isinstance(found, type) or not hasattr(found, "encoders_class"):
            raise TypeError(f"adapter: {adapter} is no model adapter: it has no encoders_class")
        return found.encoders_class
    name = read_pipeline_class(directory)
    if name not in ENCODERS_BY_PIPELINE:
        raise ValueError(
            f"model: {directory} is a {name}; encoders are known for {', '.join(ENCODERS_BY_PIPELINE)}. "
            "Name the family's adapter with --adapter, such as fv_distill.models.WanModel"
        )
    return resolve_target(ENCODERS_BY_PIPELINE[name])
