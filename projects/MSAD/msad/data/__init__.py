"""Data: data sets declared in yaml, their checks, the exactly resumable training loader, synthetic scenes."""

from .checks import check_data, clean
from .dataset_types import DATASET_TYPE_REGISTRY
from .fingerprint import dataset_fingerprint
from .loader import TrainLoader, build_train_loader
from .register import register_datasets
from .synthetic import make_dataset, register_entries

__all__ = [
    "DATASET_TYPE_REGISTRY",
    "TrainLoader",
    "build_train_loader",
    "check_data",
    "clean",
    "dataset_fingerprint",
    "make_dataset",
    "register_datasets",
    "register_entries",
]
