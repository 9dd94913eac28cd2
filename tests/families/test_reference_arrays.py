"""What becomes of the arrays of the reference's processors: pictures, instructions, marks and two-way blocks."""

import numpy as np
import pytest

from mm_jax.data.media_rule import Settings
from mm_jax.errors import UserError
from mm_jax.families import FAMILIES
from mm_jax.families.media import layout_of, media_rule
from mm_jax.inference.arrays import batch_of

VISION = dict(hidden_size=24, intermediate_size=36, num_hidden_layers=1, num_attention_heads=3, image_size=24,
              patch_size=8)  # fmt: skip
TEXT = dict(vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=4, head_dim=8)  # fmt: skip
QFORMER = dict(vocab_size=61, hidden_size=36, num_hidden_layers=2, max_position_embeddings=8)
CONFIGS = {
    "instructblip": dict(num_query_tokens=5, image_token_index=96, qformer_config=QFORMER,
                         text_config=TEXT | {"model_type": "llama"} | {"head_dim": None}),
    "kosmos-2": dict(latent_query_num=5, text_config=dict(vocab_size=97, embed_dim=32, layers=1, attention_heads=4)),
    "paligemma": dict(image_token_index=200, projection_dim=32, text_config=TEXT | {"model_type": "gemma"}),
    "gemma3": dict(image_token_index=96, mm_tokens_per_image=9, text_config=TEXT),
}  # fmt: skip
PIXELS = np.random.default_rng(0).normal(size=(2, 3, 24, 24)).astype(np.float32)


def reader(kind: str):
    values = {"model_type": kind, "vision_config": VISION} | CONFIGS[kind]
    system = FAMILIES[kind].system(values, frozenset())
    layout = layout_of(system.config, system.text.pad_id, system.text.stop_ids)
    rule = media_rule(system, Settings())
    return layout, lambda **arrays: batch_of(system.config, rule, layout, arrays)


def rows(token: int, each: int) -> dict[str, np.ndarray]:
    """A picture behind padding and before two tokens; a picture before five."""
    ids = np.array([[0] * 3 + [token] * each + [5, 6], [token] * each + [5, 6, 7, 8, 9]])
    return {"input_ids": ids, "attention_mask": (ids > 0).astype(int), "pixel_values": PIXELS}


def test_instructions_stand_in_the_slots_of_their_pictures():
    _, read = reader("instructblip")
    given = rows(96, 5)
    ids, mask = np.arange(12).reshape(2, 6) + 1, np.array([[1, 1, 1, 0, 0, 0], [1] * 6])
    batch = read(**given, qformer_input_ids=ids, qformer_attention_mask=mask)
    assert batch["instructions"][:, 0].tolist() == [[1, 2, 3] + [-1] * 5, [7, 8, 9, 10, 11, 12, -1, -1]]
    assert np.array_equal(batch["pixel_values"][:, 0], PIXELS.transpose(0, 2, 3, 1))
    for bad, message in (
        ({}, "an instruction beside each picture"),
        ({"qformer_input_ids": ids[:1]}, "one row for each of the 2 pictures"),
        ({"qformer_input_ids": np.ones((2, 9), int)}, "at most 8 tokens from 0 to 60"),
    ):
        with pytest.raises(UserError, match=message):
            read(**given, **bad)
    text = read(input_ids=np.array([[3, 4]]))
    assert "instructions" not in text and "pixel_values" not in text


def test_marks_in_place_of_a_token():
    _, read = reader("kosmos-2")
    given = rows(96, 5)
    marks = (given["input_ids"] == 96).astype(int)
    given["input_ids"] = np.where(marks, 4, given["input_ids"])
    batch = read(**given, image_embeds_position_mask=marks)
    assert batch["media_index"].tolist() == [
        [-1] * 3 + [0, 1, 2, 3, 4] + [-1] * 2,
        [0, 1, 2, 3, 4] + [-1] * 5,
    ]
    with pytest.raises(UserError, match="image_embeds_position_mask has shape"):
        read(**given, image_embeds_position_mask=marks[:, 1:])


def test_a_prefix_ends_where_the_answer_begins():
    """The image token may be no word of the decoder's; every other id must be one."""
    layout, read = reader("paligemma")
    given = rows(200, 9)
    kinds = np.zeros_like(given["input_ids"])
    kinds[:, -2:] = 1
    batch = read(**given, token_type_ids=kinds)
    assert batch["blocks"].tolist() == [[0] * 3 + [1] * 9 + [0, 0], [1] * 12 + [0, 0]]
    assert batch["tokens"].max() < 97
    assert np.array_equal(read(**given)["blocks"], given["attention_mask"])
    with pytest.raises(UserError, match="the vocabulary has 0 to 96"):
        read(**given | {"input_ids": np.where(given["input_ids"] == 5, 97, given["input_ids"])})


def test_pictures_are_blocks():
    _, read = reader("gemma3")
    batch = read(**rows(96, 9))
    assert np.array_equal(batch["blocks"] > 0, batch["media_index"] >= 0)
    assert batch["blocks"].max() == 1
