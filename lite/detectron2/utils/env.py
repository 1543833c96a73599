"""Random seeds."""

import logging
import os
import random

import numpy as np
import torch


def seed_all_rng(seed: int | None = None) -> None:
    """Seed the global generators of Python, numpy and torch (all devices).

    Args:
        seed: None draws a new one, which is logged.
    """
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
        logging.getLogger(__name__).info("Random seed: %d", seed)
    for seed_one in (random.seed, np.random.seed, torch.manual_seed):
        seed_one(seed)
    os.environ["PYTHONHASHSEED"] = str(seed)  # for processes started from here
