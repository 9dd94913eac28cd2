"""`chat --draw` of directories of transformers whose model says one sentence, with a box of the family in it."""

import numpy as np
import PIL.Image
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mm_jax.cli.main import main  # noqa: E402
from mm_jax.evaluate.draw import ANSWER  # noqa: E402
from tests.parity import test_family_chat as chats  # noqa: E402
from tests.parity import theirs  # noqa: E402

SIZE = (640, 320)
# (sentence, the end of the prompt, as it is shown, corners of the box)
CASES = {
    # top, left, bottom, right in 1024ths
    "paligemma": (
        "<loc0256><loc0128><loc0768><loc0640> red</s>",
        "\n",
        "[80, 80, 400, 240] red",
        (80, 80, 400, 240),
    ),
    # cells 4 and 20 of 32 across, 8 and 24 down, of the middle of the picture, which is what this tower sees; a box
    # goes from the middle of a cell to that of another
    "kosmos-2": (
        "<phrase>red</phrase><object><patch_index_0260><patch_index_0788></object></s>",
        "?",
        "red [205, 85, 365, 245]",
        (205, 85, 365, 245),
    ),
}


def speak(model, embedding, head, ids: list[int]) -> None:
    """Makes each id be followed by the next one, whatever else is in the text: no layer adds anything."""
    assert len(set(ids)) == len(ids)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if any(part in name for part in ("o_proj.", "down_proj.", "self_attn.out_proj.", "ffn.fc2.")):
                value.zero_()
        embedding.weight.normal_(generator=torch.Generator().manual_seed(0))
        head.weight.zero_()
        for before, after in zip(ids, ids[1:], strict=False):
            head.weight[after] = embedding.weight[before]


@pytest.mark.parametrize("family", CASES)
def test_the_box_of_an_answer(family, tmp_path, capsys):
    sentence, end, shown, corners = CASES[family]
    make, kind = chats.FAMILIES[family]
    config, processor = make(tmp_path)
    config.tie_word_embeddings = False
    config.text_config.tie_word_embeddings = False
    model = theirs.build(config, tmp_path / "in", kind)
    text = model.text_model if family == "kosmos-2" else model
    tokenizer = processor.tokenizer
    prompt = tokenizer(f"what is in the picture{end}", add_special_tokens=False)["input_ids"]
    ids = tokenizer(sentence, add_special_tokens=False)["input_ids"]
    speak(model, text.get_input_embeddings(), text.get_output_embeddings(), prompt[-1:] + ids)
    model.config.text_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "in")
    processor.save_pretrained(tmp_path / "in")
    PIL.Image.new("RGB", SIZE, (0, 0, 90)).save(tmp_path / "picture.png")
    question = "what is in the picture" + end.strip()
    arguments = ["--image", str(tmp_path / "picture.png"), "--prompt", question]
    out = tmp_path / "answer.png"
    assert main(["chat", str(tmp_path / "in"), *arguments, "--draw", str(out), "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out == f"{shown}\n({out})\n"
    drawn = np.asarray(PIL.Image.open(out))
    assert drawn.shape == (SIZE[1], SIZE[0], 3)
    rows, columns = np.nonzero((drawn == ANSWER).all(axis=-1))
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == corners
