"""Names and sizes of the configs of the data set; importing this costs nothing."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Records in each split."""

    train: int
    validation: int
    test: int


LARGE = "_large"
SIZES: dict[str, Sizes] = {
    "digits": Sizes(2400, 200, 300),
    "numbers": Sizes(1200, 100, 200),
    "ocr": Sizes(2500, 150, 300),
    "charts": Sizes(700, 100, 200),
    "tables": Sizes(800, 100, 200),
    "scenes": Sizes(10000, 240, 1600),
    "speech": Sizes(1600, 200, 300),
    "sound_scenes": Sizes(800, 120, 240),
    "text": Sizes(1000, 100, 200),
    "dialogues": Sizes(800, 100, 200),
}
_LARGE_TRAIN = {
    "digits": 8000,
    "numbers": 6000,
    "ocr": 30000,
    "charts": 4000,
    "tables": 8000,
    "scenes": 30000,
    "speech": 5000,
    "sound_scenes": 5000,
    "text": 3000,
    "dialogues": 4000,
}
# Held-out items are the same at both sizes, so that scores of small and large runs compare.
SIZES |= {
    name + LARGE: Sizes(train, SIZES[name].validation, SIZES[name].test)
    for name, train in _LARGE_TRAIN.items()
}
