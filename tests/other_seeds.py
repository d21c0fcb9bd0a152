"""A plugin of pytest under which all seeds are other ones: which tests need luck?

    SHIFT=3 pytest -p other_seeds tests/test_ppo.py

What a test draws, initialises or trains then differs. A test that fails is a coin, and has to be
written anew. Only the test that holds the digest of a seed's data is left out.
"""

import os
import random

import torch

SHIFT = int(os.environ["SHIFT"])
seed_torch = torch.manual_seed


class Generator(torch.Generator):
    def manual_seed(self, seed: int) -> torch.Generator:
        return super().manual_seed((seed + SHIFT * 0x9E3779B9) % 2**63)


class Random(random.Random):
    def seed(self, a=None, version=2) -> None:
        super().seed(a if a is None else f"{a} {SHIFT}", version)


torch.manual_seed = lambda seed: seed_torch((seed + SHIFT * 0x9E3779B9) % 2**63)
torch.Generator, random.Random = Generator, Random


def pytest_collection_modifyitems(items: list) -> None:
    items[:] = [item for item in items if not item.name.startswith("test_the_same_seed_gives")]
