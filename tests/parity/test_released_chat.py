"""Messages of systems whose prompts the authors' own code writes: XComposer2, MiniCPM-V 2.6, InternVL's own files.

The texts are spelt out here; the reference's tokenizer reads them.
"""

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mm_jax  # noqa: E402
from mm_jax.checkpoint.hf import open_hf  # noqa: E402
from mm_jax.checkpoint.kept import keep, open_kept  # noqa: E402
from mm_jax.checkpoint.pretrained import processor_of  # noqa: E402
from mm_jax.data.media_rule import MEDIA  # noqa: E402
from tests.parity import hosts  # noqa: E402
from tests.parity.released import FIXTURES  # noqa: E402
from tests.parity.test_internvl import as_released  # noqa: E402
from tests.parity.test_internvl import build as build_internvl  # noqa: E402

ONE, TWO, LONG = hosts.picture(60, 31), hosts.picture(70, 70), hosts.picture(200, 40)
ASKED = hosts.messages(["what is in the picture?", ONE])
TURNS = hosts.messages([ONE, "and", TWO, "compare: naïve, 12 %"], "a red circle", [LONG, "and now?"])
SYSTEM = [{"role": "system", "content": "be brief"}]
TEXT = hosts.messages("no picture")


def directory_of(case: str, tokenizer, to) -> object:
    shutil.copytree(FIXTURES / case, to)
    tokenizer.save_pretrained(to)
    return mm_jax.load(to)


def same(example, pieces: list) -> None:
    """Texts' ids and numbers of features, in order."""
    kept = example.image_index == -1
    ids, media = [], []
    for piece in pieces:
        ids += [0] * piece if isinstance(piece, int) else piece
        media += [isinstance(piece, int)] * (piece if isinstance(piece, int) else len(piece))
    assert (~kept).tolist() == media
    assert np.where(kept, example.tokens, 0).tolist() == ids


@pytest.mark.parametrize("name", ["a", "hd"])
def test_xcomposer2(name, tmp_path):
    """Plain: every piece of text begins with the token of beginnings; high resolution: the first one does."""
    from mm_jax.families.xcomposer2 import layout

    start, end = "[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]"
    tokenizer = hosts.sentence_pieces(start, end, add_bos_token=True, chat_template=hosts.CHATML)
    lm = directory_of(f"internlm_xcomposer2/{name}", tokenizer, tmp_path / "in")
    rule = lm.checkpoint.rule

    def tokens(picture) -> int:
        if name == "a":
            return 25
        pixels = rule.images([np.asarray(picture)])["pixel_values_0"]
        rows, columns = (n // rule.tile for n in pixels.shape[2:])
        return len(layout(columns, rows, int(rule.num_tokens**0.5)))

    def expected(text: str, *pictures) -> list:
        found = []
        for k, part in enumerate(text.split("<ImageHere>")):
            if part:
                around = name == "a" or k == 0
                found.append(tokenizer(part, add_special_tokens=around)["input_ids"])
            found += [tokens(picture) for picture in pictures[k : k + 1]]
        return found

    who = (
        "You are an AI assistant whose name is InternLM-XComposer (浦语·灵笔).\n"
        "- InternLM-XComposer (浦语·灵笔) is a multi-modality conversational language model that is developed by "
        "Shanghai AI Laboratory (上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
        "- InternLM-XComposer (浦语·灵笔) can understand and communicate fluently in the language chosen by the user "
        "such as English and 中文.\n- InternLM-XComposer (浦语·灵笔) is capable of comprehending and articulating "
        "responses effectively based on the provided image."
    )
    same(
        lm.prompt(ASKED),
        expected(
            f"{start}system\n{who}{end}\n{start}user\nwhat is in the picture?<ImageHere>{end}\n{start}assistant\n",
            ONE,
        ),
    )
    system = f"{start}system\nbe brief{end}\n"
    same(
        lm.prompt(SYSTEM + ASKED),
        expected(f"{system}{start}user\nwhat is in the picture?<ImageHere>{end}\n{start}assistant\n", ONE),
    )
    same(
        lm.prompt(SYSTEM + TURNS),
        expected(
            f"{system}{start}user\n<ImageHere>and<ImageHere>compare: naïve, 12 %{end}\n{start}assistant\na red circle"
            f"{end}\n{start}user\n<ImageHere>and now?{end}\n{start}assistant\n",
            ONE,
            TWO,
            LONG,
        ),
    )
    same(lm.prompt(SYSTEM + TEXT), expected(f"{system}{start}user\nno picture{end}\n{start}assistant\n"))
    example = lm.example(SYSTEM + TURNS[:2])
    trained = lm.processor.tokenizer.decode(example.tokens[example.loss_weights > 0], special=True)
    assert trained.strip() == f"a red circle{end}"


def test_minicpmv(tmp_path):
    """Parts on lines of their own, numbered pictures, rows of slices on lines."""
    specials = ("<|im_start|>", "<|im_end|>", "<unk>", "<image>", "</image>", "<slice>", "</slice>", "<image_id>",
                "</image_id>")  # fmt: skip
    tokenizer = hosts.byte_level(*specials)
    lm = directory_of("minicpmv_2_6/a", tokenizer, tmp_path / "in")
    unknown = tokenizer.convert_tokens_to_ids("<unk>")
    view = "<unk>" * 8
    cut = f"<slice>{view}</slice>"
    one = f"<image_id>0</image_id><image>{view}</image>"
    two = f"<image_id>1</image_id><image>{view}</image>"
    long = f"<image_id>2</image_id><image>{view}</image>{cut * 4}"
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    texts = [
        (
            ASKED,
            f"{system}<|im_start|>user\nwhat is in the picture?\n{one}<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            TURNS,
            f"{system}<|im_start|>user\n{one}\nand\n{two}\ncompare: naïve, 12 %<|im_end|>\n<|im_start|>assistant\n"
            f"a red circle<|im_end|>\n<|im_start|>user\n{long}\nand now?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            SYSTEM + TEXT,
            "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nno picture<|im_end|>\n<|im_start|>assistant\n",
        ),
    ]
    rule = lm.checkpoint.rule
    pictures = [np.asarray(picture) for picture in (ONE, TWO, LONG)]
    items = rule.items("image", rule.images(pictures), ())
    for conversation, text in texts:
        if conversation is not ASKED:  # how the pictures are cut has its own test
            for item, written in zip(items, (one, two, long), strict=True):
                text = text.replace(written, item.text.replace(MEDIA, "<unk>"))
        else:
            text = text.replace(one, items[0].text.replace(MEDIA, "<unk>"))
        ids = np.array(tokenizer(text)["input_ids"])
        example = lm.prompt(conversation)
        places = ids == unknown
        assert np.array_equal(example.image_index >= 0, places)
        assert np.array_equal(np.where(places, 0, example.tokens), np.where(places, 0, ids))


WHO = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
OLD = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"


@pytest.mark.parametrize("template", ["internvl2_5", "Hermes-2"])
def test_internvl(template, tmp_path):
    """The config names the template and does not say which token stands for a feature."""
    end, who = {"internvl2_5": ("<|im_end|>\n", WHO), "Hermes-2": ("<|im_end|>", OLD)}[template]
    build_internvl("large-qwen2", tmp_path / "in")
    as_released(tmp_path / "in", tmp_path / "released")
    path = tmp_path / "released" / "config.json"
    values = json.loads(path.read_text()) | {
        "template": template,
        "dynamic_image_size": True,
        "use_thumbnail": True,
    }
    del values["img_context_token_id"]
    path.write_text(json.dumps(values | {"max_dynamic_patch": 4}))
    pictures = {"crop_size": 32, "do_center_crop": True, "size": 32, "resample": 3, "do_normalize": True,
                "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.485, 0.456, 0.406],
                "image_std": [0.229, 0.224, 0.225]}  # fmt: skip
    (tmp_path / "released" / "preprocessor_config.json").write_text(json.dumps(pictures))
    tokenizer = hosts.byte_level("<img>", "</img>", "<IMG_CONTEXT>", "<|im_start|>", "<|im_end|>")
    tokenizer.chat_template = hosts.CHATML  # of the decoder; the reference's code does not look at it
    tokenizer.save_pretrained(tmp_path / "released")
    lm = mm_jax.load(tmp_path / "released")
    picture = {tiles: "<img>" + "<IMG_CONTEXT>" * (4 * tiles) + "</img>" for tiles in (3, 5)}
    user, assistant = "<|im_start|>user\n", "<|im_start|>assistant\n"
    system = f"<|im_start|>system\n{who}{end}"
    texts = [
        (ASKED, f"{system}{user}what is in the picture?\n{picture[3]}{end}{assistant}"),
        (
            TURNS,
            f"{system}{user}{picture[3]}\nand\n{picture[5]}\ncompare: naïve, 12 %{end}{assistant}a red circle{end}"
            f"{user}{picture[5]}\nand now?{end}{assistant}",
        ),
        (SYSTEM + TEXT, f"<|im_start|>system\nbe brief{end}{user}no picture{end}{assistant}"),
    ]
    for conversation, text in texts:
        assert lm.prompt(conversation).tokens.tolist() == tokenizer(text)["input_ids"]
    assert lm.prompt(ASKED).num_images == 3
    example = lm.example(TURNS[:2])
    trained = lm.processor.tokenizer.decode(example.tokens[example.loss_weights > 0], special=True)
    assert trained == "a red circle<|im_end|>"
    # a run has the same, or one of its own
    keep(open_hf(tmp_path / "released"), tmp_path / "run")
    kept = processor_of(open_kept(tmp_path / "run", lm.config), lm.config)
    assert kept.prompt(ASKED).tokens.tolist() == lm.prompt(ASKED).tokens.tolist()
    (tmp_path / "run" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    kept = processor_of(open_kept(tmp_path / "run", lm.config), lm.config)
    assert kept.prompt(TEXT).tokens.tolist() == tokenizer("no picture")["input_ids"]
