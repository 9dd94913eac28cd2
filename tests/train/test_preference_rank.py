"""Which preference pairs are trained on."""

import numpy as np

from mm_jax.train.preference import rank


def test_right_answers_take_turns_and_mistakes_come_first() -> None:
    """Pairs 0..5; log-probs of the rejected answers -1..-6; 1 and 4 are mistakes; 3 has none and is unusable."""
    reference = np.array([[-2.0, -1], [-2, -2], [-2, -3], [-2, np.nan], [-2, -5], [-2, -6]], np.float32)
    wrong = [False, True, False, True, True, False]
    right = ["no", "no", "yes", "yes", "no", "yes"]
    assert rank(wrong, reference, right) == [1, 2, 4, 5, 0]
