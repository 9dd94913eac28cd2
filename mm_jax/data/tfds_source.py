"""Conversations from TFDS, without TensorFlow."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from mm_jax.data.messages import BadSample, Conversation, conversation_from_json
from mm_jax.errors import UserError, nearest


class TfdsSource:
    """A split of a prepared TFDS data set in ArrayRecord format, read without TensorFlow.

    Images are not decoded here: the record keeps their encoded bytes, the processor decodes them.
    """

    def __init__(self, name: str, path: str, split: str, mapping: str, data_dir: str | os.PathLike):
        """See `SourceConfig` for path, split and mapping; a registered name is looked up in `data_dir`."""
        self.name = name
        self._split = split
        self._mapping = _load_mapping(name, mapping)
        self._where = f'source "{name}": data set {path}'
        self._directory = self._find(path, data_dir)
        self._records: Any = None
        self._length = len(self._open())

    def _find(self, path: str, data_dir: str | os.PathLike) -> str:
        """The directory that holds dataset_info.json, for a directory or a registered name."""
        import tensorflow_datasets as tfds
        from etils import epath

        if (epath.Path(path) / "dataset_info.json").exists():
            return path
        # a registered name is builder or builder/config
        if path.startswith(("/", ".", "~")) or "://" in path or path.count("/") > 1:
            raise UserError(
                f"{self._where}: no dataset_info.json there; give the directory of a version, like .../1.0.0"
            )
        if path.startswith("mm_jax_quickstart"):
            importlib.import_module("mm_jax.data.quickstart.builder")  # registers it
        try:
            builder = tfds.builder(path, data_dir=os.fspath(data_dir))
        except tfds.core.DatasetNotFoundError:
            raise UserError(f"{self._where}: no builder has this name, no directory either") from None
        except ImportError as error:
            raise UserError(f"{self._where}: needs a package that is missing ({error})") from None
        except ValueError as error:
            builder_name, _, config_name = path.partition("/")
            known = _config_names(tfds, builder_name)
            hint = nearest(config_name, known) if known else f" ({_first_line(error)})"
            raise UserError(f'{self._where}: no config "{config_name}"{hint}') from None
        if not (epath.Path(builder.data_path) / "dataset_info.json").exists():
            raise UserError(
                f"{self._where}: not prepared in {data_dir}; run `python -m mm_jax data`, or "
                'download_and_prepare(file_format="array_record") for a builder of your own'
            )
        return os.fspath(builder.data_path)

    def _open(self) -> Any:
        """The TFDS data source of the split; opened once in each process."""
        if self._records is None:
            import tensorflow_datasets as tfds

            try:
                builder = tfds.builder_from_directory(self._directory)
                known = set(builder.info.splits)
                for part in self._split.split("+"):
                    if part.strip().partition("[")[0] not in known | {"all"}:
                        raise UserError(f'{self._where}: no split "{part}"{nearest(part, known)}')
                self._records = builder.as_data_source(
                    split=self._split, decoders=_keep_images_encoded(tfds, builder.info.features)
                )
            except NotImplementedError:
                raise UserError(
                    f"{self._where}: stored as tfrecord, which has no random access; prepare it again with "
                    'file_format="array_record"'
                ) from None
            except ImportError as error:
                raise UserError(f"{self._where}: needs a package that is missing ({error})") from None
            except ValueError as error:
                raise UserError(f'{self._where}: bad split "{self._split}" ({_first_line(error)})') from None
        return self._records

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Conversation:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name}[{index}] of {len(self)} samples")
        record = self._open()[index % len(self)]
        try:
            conversation = self._mapping(record)
            if not isinstance(conversation, Conversation):
                images = record.get("images", [record["image"]] if "image" in record else ())
                conversation = conversation_from_json(
                    conversation, images=list(images), audio=list(record.get("audio", ()))
                )
        except UserError as error:
            error.args = (f"{self._where}, record {index}: {error}",)
            raise
        return dataclasses.replace(
            conversation, source=self.name, id=conversation.id or f"{self._split}:{index}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_records": None}


def _load_mapping(name: str, spec: str) -> Callable[[Mapping[str, Any]], Conversation | dict[str, Any]]:
    if not spec:
        return record_to_json
    module, _, function = spec.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f'source "{name}": mapping "{spec}" cannot be imported ({error}); expected "module:function"'
        ) from None


def record_to_json(record: Mapping[str, Any]) -> dict[str, Any]:
    """Default mapping: the feature `conversation` holds chat JSON, its media are indices into `images`,
    `audio`."""
    if "conversation" not in record:
        raise BadSample(
            'the record has no feature "conversation" (features: ' + ", ".join(sorted(record)) + "); give a "
            "mapping to turn it into a conversation",
            "bad_record",
        )
    try:
        obj = json.loads(record["conversation"])
    except ValueError as error:
        raise BadSample(f'the feature "conversation" is not valid JSON ({error})', "bad_json") from None
    identity = record.get("id", b"")
    return {"id": identity.decode() if isinstance(identity, bytes) else str(identity), **obj}


def _keep_images_encoded(tfds: Any, features: Any) -> dict[str, Any]:
    """Decoders that pass the bytes of every image feature through, alone, in a sequence or in a nested
    dict."""
    decoders: dict[str, Any] = {}
    for key, feature in features.items():
        inner = feature
        while isinstance(inner, tfds.features.Sequence):
            inner = inner.feature
        if isinstance(inner, tfds.features.FeaturesDict):
            nested = _keep_images_encoded(tfds, inner)
            if nested:
                decoders[key] = nested
        elif isinstance(inner, tfds.features.Image):
            keep = tfds.decode.SkipDecoding()
            # SkipDecoding of tfds 4.9 lacks the numpy methods for features inside sequences
            keep.decode_batch_example_np = keep.decode_example_np
            keep.decode_ragged_example_np = keep.decode_example_np
            decoders[key] = keep
    return decoders


def _config_names(tfds: Any, builder_name: str) -> list[str]:
    try:
        return list(tfds.builder_cls(builder_name).builder_configs)
    except Exception:  # a hint only: the caller has the real error already
        return []


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
