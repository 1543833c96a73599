"""Random seeds."""

import logging
import os
import random
import secrets

import numpy as np
import torch


def seed_all_rng(seed: int | None = None) -> None:
    """Seed the global generators of Python, numpy and torch (all devices).

    Args:
        seed: None draws a new one, which is logged.
    """
    chosen = secrets.randbits(31) if seed is None else int(seed)
    for set_seed in (random.seed, np.random.seed, torch.manual_seed):
        set_seed(chosen)
    # Hashes of this process are fixed already; those of the processes it starts follow.
    os.environ["PYTHONHASHSEED"] = str(chosen)
    if seed is None:
        logging.getLogger(__name__).info("No seed was given; this run uses %d.", chosen)
