"""Package metadata. ``kernels/`` is installed as ``fastseg.kernels``: one top-level name lands in the environment."""

from pathlib import Path

from setuptools import find_packages, setup

VERSION = next(
    line.split('"')[1]
    for line in Path(__file__).with_name("fastseg").joinpath("__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)
TEST = ["pytest>=8", "pytest-benchmark>=5", "expecttest"]  # expecttest: torch's sample databases import it
PLOT = ["matplotlib>=3.8"]
RAY = ["ray[data]"]
ONNX = ["onnx", "onnxscript"]
CONVERT = ["segmentation-models-pytorch>=0.5", "torchvision", "timm>=1", "transformers>=4.50"]
DEMO = ["scikit-image>=0.25", "pillow>=12.2", "tqdm"]

setup(
    name="fastseg-kernels",
    version=VERSION,
    description="Fused Triton kernels, drop-in modules and models for semantic segmentation in PyTorch",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["semantic segmentation", "pytorch", "triton", "cuda", "deeplab", "unet", "segnet", "fcn", "aspp"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    package_dir={"fastseg.kernels": "kernels"},
    packages=[
        *find_packages(include=["fastseg", "fastseg.*"]),
        "fastseg.kernels",
        *(f"fastseg.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_data={
        "fastseg": ["py.typed", "training/recipes/*.json", "training/recipes/datasets/*.json"],
        "fastseg.kernels": ["tuned/*.json"],
    },
    install_requires=["torch>=2.11", "triton>=3.6; sys_platform == 'linux'", "numpy>=1.26", "pillow>=12.2"],
    extras_require={
        "test": [*TEST, *DEMO, *PLOT],
        "bench": ["pytest>=8", "pytest-benchmark>=5"],
        "demo": DEMO,
        "plot": PLOT,
        "hub": ["safetensors"],
        "onnx": ONNX,
        "ray": RAY,
        "convert-test": CONVERT,
        "dev": [*TEST, *DEMO, *PLOT, *ONNX, "onnxruntime", "safetensors", "ruff", "mypy"],
    },
    entry_points={"console_scripts": ["fastseg = fastseg.cli:main"]},
)
