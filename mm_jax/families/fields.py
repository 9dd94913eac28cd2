"""Reading a config.json so that no field is ever ignored by accident."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mm_jax.errors import UserError
from mm_jax.models.layers import Activation
from mm_jax.models.rotary import RopeScaling

# Fields that change no number of a forward pass: names, files, first weights, dropout, generation. Whether embeddings
# are tied is read off the tensors.
HARMLESS = frozenset(
    """
    _name_or_path _commit_hash architectures model_type transformers_version dtype torch_dtype use_cache
    initializer_range initializer_factor attention_dropout hidden_dropout dropout bos_token_id eos_token_id
    pad_token_id unk_token_id sep_token_id return_dict output_attentions output_hidden_states chunk_size_feed_forward
    is_encoder_decoder is_decoder id2label label2id num_labels problem_type pretraining_tp tie_word_embeddings
    finetuning_task prefix task_specific_params auto_map ignore_index unsloth_fixed unsloth_version
    """.split()
)

# Settings of generation and the like, which old configs repeat for every part.
GENERATION = frozenset(
    """
    bad_words_ids begin_suppress_tokens cross_attention_hidden_size decoder_start_token_id diversity_penalty
    do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
    forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_scores pruned_heads remove_invalid_values repetition_penalty
    return_dict_in_generate suppress_tokens temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k
    top_p torchscript typical_p
    """.split()
)

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}


class Fields:
    """One object of a config.json.

    Args:
      values: the object.
      defaults: of the reference's config class: saved files leave out what equals them.
      where: its place in the file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], where: str = "config.json"):
        self.values, self.defaults, self.where = values, defaults, where
        self.asked: set[str] = set()

    def __call__(self, name: str) -> Any:
        """The value or else the default. Raises UserError when there is neither, or a value of another type."""
        self.asked.add(name)
        default = self.defaults.get(name)
        if name not in self.values:
            if name not in self.defaults:
                raise UserError(f'{self.where} lacks the field "{name}"')
            return default
        value = self.values[name]
        kind = {float: int | float}.get(type(default), type(default))
        if None not in (value, default) and not isinstance(value, kind | list):
            raise UserError(f'{self.where}: "{name}" is {value!r}, {type(default).__name__} is needed')
        return value

    def skip(self, *names: str) -> None:
        """These fields change nothing here."""
        self.asked.update(names)

    def activation(self, name: str) -> Activation:
        value = self(name)
        if value not in ACTIVATIONS:
            raise self.unsupported(name, "known: " + ", ".join(ACTIVATIONS))
        return ACTIVATIONS[value]

    def square(self, name: str) -> int:
        """A size that may be written as an integer or as two equal ones."""
        value = self(name)
        sides = value if isinstance(value, list) else [value]
        if len(set(sides)) != 1:
            raise self.unsupported(name, "equal sides are needed")
        return sides[0]

    def rope(self, max_length: int) -> tuple[float, RopeScaling | None]:
        """Base and scaling of the rotary embedding, in the spelling of version 5 or in that of hub files."""
        old = self("rope_scaling") if "rope_scaling" in self.values else None
        new = self("rope_parameters") if "rope_parameters" in self.values else None
        theta = self("rope_theta") if "rope_theta" in {*self.values, *self.defaults} else 10_000.0
        values = dict(old or new or {})
        kind = values.pop("rope_type", None) or values.pop("type", None) or "default"
        values.pop("type", None)
        rope = Fields(values, {}, f"{self.where}: rope_scaling")
        theta = float(rope("rope_theta")) if "rope_theta" in values else float(theta)
        if kind not in _SCALINGS and kind != "default":
            raise UserError(f'{self.where}: rope_type "{kind}" is not supported')
        scaling = None if kind == "default" else _SCALINGS[kind](rope, max_length)
        rope.finish()
        return theta, scaling

    def rope_sections(self, default: tuple[int, ...]) -> tuple[tuple[int, ...], bool]:
        """M-RoPE: how many frequencies each axis turns, and whether they take turns; to be called before `rope`."""
        sections, interleaved = default, False
        for name in ("rope_parameters", "rope_scaling"):
            if rope := self.values.get(name):
                rope = dict(rope)
                sections = tuple(rope.pop("mrope_section", sections))
                interleaved = rope.pop("mrope_interleaved", interleaved)
                plain = {"mrope": "default"}  # the name that hub files have for it
                rope |= {k: plain.get(rope[k], rope[k]) for k in ("type", "rope_type") if k in rope}
                self.values = {**self.values, name: rope}
        return sections, interleaved

    def rotary_channels(self, head_dim: int, default: float) -> int:
        """How many channels of a head are turned, of a share with this default; to be called before `rope`."""
        share = self("partial_rotary_factor") if "partial_rotary_factor" in self.values else default
        for name in ("rope_parameters", "rope_scaling"):
            if rope := self.values.get(name):
                rope = dict(rope)
                share = rope.pop("partial_rotary_factor", share)
                self.values = {**self.values, name: rope}
        return int(head_dim * share)

    def unsupported(self, name: str, why: str = "") -> UserError:
        """The error for a value that we cannot compute with."""
        return UserError(
            f'{self.where}: "{name}" is {self(name)!r}, which is not supported' + (f"; {why}" if why else "")
        )

    def finish(self) -> None:
        """Raises UserError naming a field that nobody asked for, unless it is off or known to change nothing."""
        for name, value in self.values.items():
            off = value is None or value is False
            if name not in self.asked | HARMLESS | GENERATION and not off:
                raise UserError(
                    f'{self.where} has the field "{name}" ({value!r}), which is not supported; '
                    "if it changes no numbers, remove it from the file"
                )


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """The reference's eos_token_id, which may be none, one or several."""
    return tuple(value) if isinstance(value, list) else () if value is None else (value,)


def _linear(rope: Fields, max_length: int) -> RopeScaling:
    return RopeScaling("linear", float(rope("factor")))


def _dynamic(rope: Fields, max_length: int) -> RopeScaling:
    rope.skip("original_max_position_embeddings")  # the reference computes with max_position_embeddings
    return RopeScaling("dynamic", float(rope("factor")), max_length)


def _llama3(rope: Fields, max_length: int) -> RopeScaling:
    rope.defaults = {"original_max_position_embeddings": max_length}
    return RopeScaling(
        "llama3",
        float(rope("factor")),
        rope("original_max_position_embeddings"),
        low_factor=float(rope("low_freq_factor")),
        high_factor=float(rope("high_freq_factor")),
    )


def _yarn(rope: Fields, max_length: int) -> RopeScaling:
    rope.defaults = dict.fromkeys(
        ("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow")
    ) | {
        "original_max_position_embeddings": max_length,
        "truncate": True,
        "factor": None,
    }
    original = rope("original_max_position_embeddings")
    factor = float(rope("factor") or max_length / original)
    magnitude, scale, divisor = rope("attention_factor"), rope("mscale"), rope("mscale_all_dim")
    if magnitude is None and scale and divisor:
        magnitude = yarn_magnitude(factor, scale) / yarn_magnitude(factor, divisor)
    elif magnitude is None:
        magnitude = yarn_magnitude(factor)
    return RopeScaling(
        "yarn",
        factor,
        original,
        fast_turns=float(rope("beta_fast") or 32),
        slow_turns=float(rope("beta_slow") or 1),
        whole_channels=rope("truncate"),
        magnitude=float(magnitude),
    )


def yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    """Peng et al. 2023, equation 22."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


_SCALINGS = {"linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn}
