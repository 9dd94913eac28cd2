import pytest

from mm_jax.lm import LanguageModel
from tests.tiny import tiny


@pytest.fixture(scope="session")
def lm() -> LanguageModel:
    return LanguageModel(*tiny(resampler=True), max_length=256)
