"""The `tensorflow_datasets` builder `mm_jax_quickstart`: chats about rendered pictures and speech.

A record has `id`, `conversation` (chat JSON whose image and audio parts hold indices), `images` (PNG) and
`audio` (WAV files, 16-bit mono 16 kHz). Read it without decoding:

    tfds.data_source("mm_jax_quickstart/scenes", split="test", data_dir=directory, decoders=DECODERS)

Item i of a split is drawn from a generator seeded by (kind, split, i) alone: identical on every machine, for
every number of processes, and the first items of a `_large` config are those of the small one.
"""

import dataclasses
import importlib
import random
from collections.abc import Callable, Iterator, Sequence

import tensorflow_datasets as tfds

from mm_jax.data.quickstart.sample import SPLITS, Sample, record
from mm_jax.data.quickstart.sizes import LARGE, SIZES

MODULES = {
    "digits": "digits",
    "numbers": "digits",
    "ocr": "words",
    "charts": "charts",
    "tables": "tables",
    "scenes": "scenes",
    "speech": "speech",
    "sound_scenes": "sound_scenes",
    "text": "text",
    "dialogues": "dialogues",
}


class EncodedImages(tfds.decode.SkipDecoding):
    """Leaves the PNG bytes as they are; tfds 4.9 forgot the numpy method for features inside a sequence."""

    def decode_batch_example_np(self, serialized: Sequence[bytes]) -> Sequence[bytes]:
        return serialized


DECODERS = {"images": EncodedImages()}


def renderer(kind: str) -> Callable[[random.Random, str, int], Sample]:
    """The function that draws item `index` of a split; imported late, since some need heavy libraries."""
    return getattr(importlib.import_module(f"mm_jax.data.quickstart.{MODULES[kind]}"), kind)


def item(kind: str, split: str, index: int) -> dict:
    """One record, made on its own."""
    rng = random.Random(f"{kind}/{split}/{index}")
    return record(renderer(kind)(rng, split, index), f"{kind}-{split}-{index:05d}")


@dataclasses.dataclass(eq=False)
class QuickstartConfig(tfds.core.BuilderConfig):
    """What and how much: `QuickstartConfig(name="tiny", kind="digits", train=8, validation=2, test=2)`."""

    kind: str = "digits"
    train: int = 0
    validation: int = 0
    test: int = 0


class MmJaxQuickstart(tfds.core.GeneratorBasedBuilder):
    """Pictures and sounds with questions, all rendered by libraries or shipped inside them."""

    VERSION = tfds.core.Version("1.3.2")
    BUILDER_CONFIGS = [
        QuickstartConfig(name=name, kind=name.removesuffix(LARGE), **dataclasses.asdict(sizes))
        for name, sizes in SIZES.items()
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "id": tfds.features.Text(),
                "conversation": tfds.features.Text(),
                "images": tfds.features.Sequence(tfds.features.Image(shape=(None, None, 3))),
                "audio": tfds.features.Sequence(tfds.features.Text()),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self, features=features, description=self.__doc__, disable_shuffling=True
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # everything is rendered here
        return {split: self._generate_examples(split) for split in SPLITS if self._size(split)}

    def _size(self, split: str) -> int:
        return getattr(self.builder_config, split)

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        for index in range(self._size(split)):
            yield index, item(self.builder_config.kind, split, index)
