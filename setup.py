from setuptools import find_packages, setup

EXTRAS = {
    "wandb": ["wandb>=0.19,<1"],
    "video": ["av>=14,<19"],
    "digits": ["scikit-learn>=1.4,<2", "matplotlib>=3.8,<4"],
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5,<10"],
}
EXTRAS["dev"] = [
    *EXTRAS["digits"],
    *EXTRAS["video"],
    "pytest>=8,<10",
    "ruff==0.17.6",
    "mypy==2.4.1",
    "types-PyYAML",
    "pre-commit>=4,<5",
]

setup(
    name="fv_distill",
    version="0.1.0",
    description="Distil slow video-diffusion models into few-step ones",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"fv_distill": ["py.typed"]},
    # The upper bounds are the newest releases that the tests ran with.
    install_requires=[
        "torch>=2.9,<2.15",
        "accelerate>=1.15,<1.16",
        "diffusers>=0.42.1,<0.43",
        "transformers>=5.20,<6",
        "peft>=0.21,<0.22",
        "safetensors>=0.5,<1",
        "datasets>=5.0,<6",
        "huggingface_hub>=2.0,<3",
        "omegaconf>=2.3,<3",
        "pydantic>=2.10,<3",
        "rich>=13,<16",
        "tensorboard>=2.18,<3",
        "pyarrow>=18",
        "numpy>=1.26,<3",
        "pillow>=11",
        "ftfy>=6.2,<7",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["fv-distill = fv_distill.cli:main"]},
)
