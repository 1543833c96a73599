import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "detectron2" / "__init__.py").read_text()).group(1)

setup(
    name="detectron2-lite",
    version=VERSION,
    description="An independent, pure-Python implementation of the core of detectron2's API",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["detectron2", "detectron2.*"]),
    package_data={"detectron2.model_zoo": ["configs/*.yaml", "configs/*/*.yaml"]},
    install_requires=[
        "fvcore",
        "iopath",
        "matplotlib",
        "numpy>=1.26",
        "opencv-python",
        "Pillow",
        "pycocotools",
        "shapely",
        "tabulate",
        "tensorboard",
        "termcolor",
        "torch>=2.4",
        "torchvision>=0.19",
        "tqdm",
    ],
    extras_require={"fast-eval": ["hotcoco"]},
)
