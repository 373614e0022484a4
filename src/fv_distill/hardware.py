"""Peak arithmetic rates of known accelerators, for model FLOP utilisation and for estimates."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_NAMES = {"float32": "float32", "tfloat32": "tfloat32", "bfloat16": "half", "float16": "half"}

# TFLOP/s of dense matrix products: float32 without tensor cores, TF32, and bfloat16 or float16 with float32 sums. Data
# sheets print the tensor cores' figures with 2:4 sparsity, which are twice these. Consumer cards' figures are those of
# "FP32 accumulate", which is what torch's products use. The first pattern that is found in a device's name counts.
_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    # NVIDIA Blackwell architecture: HGX and DGX B200 data sheets, an eighth of the machine's figures.
    (r"\bB200\b", {"float32": 75, "tfloat32": 1125, "half": 2250}),
    # NVIDIA H200 Tensor Core GPU data sheet.
    (r"\bH200 NVL\b", {"float32": 60, "tfloat32": 417.5, "half": 835.5}),
    (r"\bG?H200\b", {"float32": 67, "tfloat32": 494.5, "half": 989.5}),
    # NVIDIA H100 Tensor Core GPU data sheet; the H800 has slower links and the same cores.
    (r"\bH[18]00 NVL\b", {"float32": 60, "tfloat32": 417.5, "half": 835.5}),
    (r"\bH[18]00 PCIe\b", {"float32": 51, "tfloat32": 378, "half": 756.5}),
    (r"\bH[18]00\b", {"float32": 67, "tfloat32": 494.5, "half": 989.5}),
    # NVIDIA A100 Tensor Core GPU data sheet, SXM and PCIe alike; the A800 has slower links and the same cores.
    (r"\bA[18]00\b", {"float32": 19.5, "tfloat32": 156, "half": 312}),
    # NVIDIA A10, A30 and A40 data sheets.
    (r"\bA10\b", {"float32": 31.2, "tfloat32": 62.5, "half": 125}),
    (r"\bA30\b", {"float32": 10.3, "tfloat32": 82, "half": 165}),
    (r"\bA40\b", {"float32": 37.4, "tfloat32": 74.8, "half": 149.7}),
    # NVIDIA L4, L40 and L40S data sheets.
    (r"\bL40S\b", {"float32": 91.6, "tfloat32": 183, "half": 362.05}),
    (r"\bL40\b", {"float32": 90.5, "tfloat32": 90.5, "half": 181.05}),
    (r"\bL4\b", {"float32": 30.3, "tfloat32": 60, "half": 121}),
    # NVIDIA RTX Blackwell, Ada and Ampere GA102 architecture white papers, appendix A.
    (r"\bRTX 5090(?! D)\b", {"float32": 104.8, "tfloat32": 104.8, "half": 209.5}),
    (r"\bRTX 4090(?! D)\b", {"float32": 82.6, "tfloat32": 82.6, "half": 165.2}),
    (r"\bRTX 3090(?! Ti)\b", {"float32": 35.6, "tfloat32": 35.6, "half": 71}),
    # AMD Instinct MI300X and MI325X data sheets.
    (r"\bMI3(?:00|25)X\b", {"float32": 163.4, "tfloat32": 653.7, "half": 1307.4}),
)
# A slice of a card, or a slower card of the same name.
_OTHER_CARDS = re.compile(r"\bMIG\b|Laptop|Max-Q|Mobile", re.IGNORECASE)


def peak_flops(device_name: str, dtype: "torch.dtype | str") -> float | None:
    """The most dense floating-point operations per second that a device is rated for.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it, for instance "NVIDIA H100 80GB HBM3".
        dtype: of the matrix products: float32, bfloat16 or float16 as a torch type or by name, or "tfloat32" for
            float32 products on tensor cores (`torch.set_float32_matmul_precision("high")`).

    Returns:
        FLOP/s, where a multiplication and an addition are two; None for a device or type that isn't in the table.
    """
    kind = _NAMES.get(str(dtype).removeprefix("torch."))
    if kind is None or _OTHER_CARDS.search(device_name):
        return None
    for pattern, figures in _PEAKS:
        if re.search(pattern, device_name):
            return figures[kind] * 1e12
    return None
