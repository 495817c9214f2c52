"""One seed in, every global random generator set."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators, the accelerator's included. seed: 0 or more.

    Data order and sampling do not draw from these; they are for initial weights and dropout.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
