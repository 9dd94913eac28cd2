"""The published recipes under configs/, run by the command over tiny checkpoints that transformers writes."""

import io
import json
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mm_jax  # noqa: E402
from mm_jax.checkpoint.run import load_params  # noqa: E402
from mm_jax.cli.main import main  # noqa: E402
from mm_jax.train.config import load_config  # noqa: E402
from mm_jax.train.encode import Encode  # noqa: E402
from mm_jax.train.metrics import read_metrics  # noqa: E402
from mm_jax.train.setup import prepare  # noqa: E402
from tests.parity import hosts, theirs  # noqa: E402
from tests.parity import test_assembly as assembly  # noqa: E402
from tests.parity import test_blip as blip  # noqa: E402
from tests.parity import test_internvl_chat as internvl  # noqa: E402
from tests.parity import test_llava_chat as llava  # noqa: E402
from tests.parity import test_qwen_chat as qwen  # noqa: E402

CONFIGS = Path(mm_jax.__file__).parents[1] / "configs"
CAPTIONS = ["a red circle", "a blue square", "the quick brown fox"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Captions and dialogues over the same pictures, as chat JSONL and in LLaVA's form."""
    root = tmp_path_factory.mktemp("data")
    chats, lists = {"captions": [], "dialogues": []}, {"captions": [], "dialogues": []}
    for k, caption in enumerate(CAPTIONS):
        hosts.picture(30 + 20 * k, 40, seed=k).save(root / f"{k}.png")
        turns = {
            "captions": ["Describe it.", caption],
            "dialogues": ["what is it?", caption, "how many?", f"{k} digits"],
        }
        for name, said in turns.items():
            first = [{"type": "image", "image": f"{k}.png"}, {"type": "text", "text": said[0]}]
            roles = ["user", "assistant"] * (len(said) // 2)
            contents = [first, *said[1:]]
            chats[name].append(
                {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]}
            )
            values = [f"<image>\n{said[0]}" if n == 0 else text for n, text in enumerate(said)]
            speakers = ["human", "gpt"] * (len(said) // 2)
            turns_ = [{"from": s, "value": v} for s, v in zip(speakers, values, strict=True)]
            lists[name].append({"id": str(k), "image": f"{k}.png", "conversations": turns_})
    for name in chats:
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in chats[name]))
        (root / f"{name}.json").write_text(json.dumps(lists[name]))
    return root


def decoder_like(checkpoint: Path, directory: Path) -> str:
    """A decoder of the size that a checkpoint has, with other weights."""
    theirs.build(
        transformers.AutoConfig.from_pretrained(checkpoint).text_config, directory, scales={"embed": 2.0}
    )
    return str(directory)


def make_llava(root: Path) -> dict[str, str]:
    llava.build("crop", root / "hf")
    return {"checkpoint": str(root / "hf"), "decoder": decoder_like(root / "hf", root / "decoder")}


def make_qwen2_vl(root: Path) -> dict[str, str]:
    qwen.build(root / "hf")
    return {"checkpoint": str(root / "hf")}


def make_internvl(root: Path) -> dict[str, str]:
    internvl.build(root / "hf")
    vision = transformers.AutoConfig.from_pretrained(root / "hf").vision_config
    theirs.build(vision, root / "vision", "InternVLVisionModel", scales={"embed": 2.0})
    return {
        "checkpoint": str(root / "hf"),
        "vision": str(root / "vision"),
        "decoder": decoder_like(root / "hf", root / "decoder"),
    }


def make_blip2(root: Path) -> dict[str, str]:
    tokenizer = hosts.byte_level("<image>", begin=True)
    config = transformers.Blip2Config(
        vision_config=theirs.VISION | dict(image_size=24, patch_size=8),
        qformer_config=blip.QFORMER,
        text_config=transformers.OPTConfig(
            **theirs.TEXT | blip.OPT | dict(vocab_size=len(tokenizer), max_position_embeddings=256)
        ).to_dict(),
        num_query_tokens=blip.QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    theirs.build(config, root / "hf", "Blip2ForConditionalGeneration", scales=blip.SCALES)
    tokenizer.save_pretrained(root / "hf")
    transformers.BlipImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(root / "hf")
    return {"checkpoint": str(root / "hf")}


def make_assembly(root: Path) -> dict[str, str]:
    assembly.write_tower("Siglip", root / "siglip")
    assembly.write_decoder("Qwen3", root / "qwen3")
    return {"vision": str(root / "siglip"), "decoder": str(root / "qwen3")}


# (what writes the directories, picture slots of a row, class of the saved run, where weights change by stage)
RECIPES = {
    "llava_1_5_7b": (make_llava, 3, "LlavaForConditionalGeneration"),
    "qwen2_vl_7b": (make_qwen2_vl, 256, "Qwen2VLForConditionalGeneration"),
    "internvl2_5_4b": (make_internvl, 12, "InternVLForConditionalGeneration"),
    "blip2_opt_2_7b": (make_blip2, 3, "Blip2ForConditionalGeneration"),
    "siglip2_qformer_qwen3": (make_assembly, 3, None),
}


@pytest.fixture(scope="module", params=RECIPES)
def trained(request, data, tmp_path_factory):
    """(name, run directory, its directories): four steps of each stage by the command."""
    root = tmp_path_factory.mktemp(request.param)
    make, slots, _ = RECIPES[request.param]
    directories, path = make(root), CONFIGS / f"{request.param}.py"
    config = load_config(path)
    options = {f"init.{name}": directory for name, directory in directories.items()}
    for name, source in config.sources.items():
        kind = "captions" if name == "captions" else "dialogues"
        options[f"sources.{name}.path"] = data / f"{kind}.{'json' if source.kind == 'llava' else 'jsonl'}"
    for stage in config.stages:
        sizes = {"rows": 2, "length": 256, "images": slots, "bins": 2}
        options |= {f"stages.{stage}.batch.{name}": size for name, size in sizes.items()}
        options |= {f"stages.{stage}.steps": 4, f"stages.{stage}.optimizer.warmup-steps": 1}
    options |= {"log-every": 1}
    if not config.init.checkpoint:  # the Q-Former of its own is large
        sizes = {"num-layers": 2, "hidden-dim": 24, "num-heads": 3, "mlp-dim": 32, "num-queries": 5}
        options |= {f"model.image-projector.{name}": size for name, size in sizes.items()}
    if request.param != "llava_1_5_7b":  # CPUs are slow in bfloat16
        options |= {"model.dtype": "float32", "remat": "none"}
    arguments = [str(x) for name, value in options.items() for x in (f"--{name}", value)]
    assert main(["train", str(path), "--run", str(root / "run"), *arguments]) == 0
    return request.param, root / "run", directories


def test_trains(trained):
    """All stages, nothing dropped, finite losses; what moves is what the recipe names."""
    name, run, _ = trained
    config = load_config(CONFIGS / f"{name}.py")
    lines = [x for x in read_metrics(run) if "loss" in x]
    assert [x["stage"] for x in lines] == [stage for stage in config.stages for _ in range(4)]
    assert all(np.isfinite(x["loss"]) and x["dropped"] == 0 and x["compilations"] == 1 for x in lines)
    stages = list(config.stages)
    for before, after in zip(stages, stages[1:], strict=False):
        one, two = load_params(run, before), load_params(run, after)
        for part in one:
            leaves = zip(jax_leaves(one[part]), jax_leaves(two[part]), strict=True)
            moved = any(not np.array_equal(a, b) for a, b in leaves)
            assert moved == (part in config.stages[after].trainable), part


def jax_leaves(tree):
    import jax

    return jax.tree.leaves(tree)


@pytest.mark.parametrize("trained", ["llava_1_5_7b"], indirect=True)
def test_answers(trained, data, capsys):
    _, run, _ = trained
    capsys.readouterr()
    ask = ["--image", str(data / "0.png"), "--prompt", "what is it?", "--max-new-tokens", "4"]
    assert main(["generate", str(run), *ask]) == 0
    assert capsys.readouterr().out.strip()


def test_becomes_a_directory(trained, tmp_path, capsys):
    """transformers loads it whole; a combination of one's own is written in our own format, and says so."""
    name, run, _ = trained
    kind = RECIPES[name][2]
    capsys.readouterr()
    assert main(["convert", str(run), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    if kind is None:
        assert "in mm_jax's own format" in capsys.readouterr().out
        assert mm_jax.load(tmp_path / "out").config.dtype == "bfloat16"
        return
    model, info = getattr(transformers, kind).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert model.dtype == torch.bfloat16
    again = mm_jax.load(tmp_path / "out")
    assert again.processor.template.source == mm_jax.load(run).processor.template.source


TEXTS = {
    ("llava_1_5_7b", "align"): ("<s>" + "<image>" * 9 + " a red circle\n", "a red circle\n"),
    ("llava_1_5_7b", "instruct"): (
        "<s> A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: " + "<image>" * 9 + " \n"
        "what is it? ASSISTANT: a red circle</s> USER: how many? ASSISTANT: 0 digits</s>",
        "a red circle</s>0 digits</s>",
    ),
    ("blip2_opt_2_7b", "speak"): ("<image>" * 5 + "<s>Describe it. a red circle\n", "a red circle\n"),
}  # fmt: skip


@pytest.mark.parametrize("trained", ["llava_1_5_7b", "blip2_opt_2_7b"], indirect=True)
def test_texts(trained):
    """What the stages read and learn, by literal example."""
    name, run, _ = trained
    config = mm_jax.train.config.read_config(run)
    setup = prepare(config, run)
    for stage in config.stages:
        example = Encode.of(setup.processor, config.stages[stage])(
            setup.sources[next(iter(config.stages[stage].mixture))][0]
        )
        decode = setup.processor.tokenizer.decode
        whole, learnt = TEXTS[name, stage]
        assert decode(example.tokens, special=True) == whole
        trained_ = decode(example.tokens[example.loss_weights > 0], special=True)
        assert trained_.replace("</s> ", "</s>").lstrip(" ") == learnt  # a token may hold the space before it


def test_readme_fine_tuning(tmp_path, monkeypatch, capsys):
    """The section of the README: its files, its commands."""
    blocks = re.findall(
        r"^```(\w+)([^\n]*)\n(.*?)^```$", (CONFIGS.parent / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    for _, about, text in blocks:
        if found := re.search(r"file=(\S+)", about):
            Path(found[1]).parent.mkdir(exist_ok=True)
            Path(found[1]).write_text(text)
    hosts.picture(64, 48).save("my.png")
    monkeypatch.setattr("sys.stdin", io.StringIO("what is it?\n"))
    [section] = [text for language, _, text in blocks if language == "bash" and "tiny_llava.py" in text]
    first, *commands = section.splitlines()
    assert first == "python tiny_llava.py"
    exec(compile(Path("tiny_llava.py").read_text(), "tiny_llava.py", "exec"), {"__name__": "__main__"})
    for command in commands:
        assert main(shlex.split(command.removeprefix("python -m mm_jax "))) == 0, command
    shown = capsys.readouterr().out
    assert "<image x16>what is in the picture? ASSISTANT: [some shapes</s>]" in shown
    transformers.LlavaForConditionalGeneration.from_pretrained("runs/tuned_hf")


def test_compiles_without_the_checkpoints(capsys):
    """The sizes of LLaVA-1.5-7B and Qwen2-VL-7B are in their configs; those of InternVL2.5-4B are not."""
    from mm_jax.train.ahead import abstract_batch
    from mm_jax.train.start import planned_config

    config = planned_config(load_config(CONFIGS / "llava_1_5_7b.py"))
    shapes = abstract_batch(config, config.stages["align"])
    assert shapes["pixel_values"].shape == (64, 4, 336, 336, 3) and shapes["tokens"].shape == (64, 2560)
    assert config.model.image_tokens == 576 and config.model.decoder.vocab_size == 32_064
    config = planned_config(load_config(CONFIGS / "qwen2_vl_7b.py"))
    shapes = abstract_batch(config, config.stages["instruct"])
    assert shapes["patches"].shape == (8, 12_288, 1176) and shapes["positions"].shape == (8, 4096, 3)
    from mm_jax.train.setup import abstract_params

    count = sum(x.size for x in jax.tree.leaves(abstract_params(config.model)))
    assert count == 8_291_375_616  # of Qwen/Qwen2-VL-7B-Instruct, as the hub shows
    assert main(["compile", str(CONFIGS / "internvl2_5_4b.py")]) == 2
    assert "there is no directory checkpoints/" in capsys.readouterr().err


def test_sizes_of_checkpoints_that_are_there(tmp_path, capsys):
    """A stage with patches compiles from shapes alone."""
    qwen.build(tmp_path / "hf")
    options = {"init.checkpoint": tmp_path / "hf", "remat": "none"}
    options |= {f"stages.instruct.batch.{k}": n for k, n in (("rows", 1), ("length", 32), ("images", 32))}
    arguments = [str(x) for name, value in options.items() for x in (f"--{name}", value)]
    assert main(["compile", str(CONFIGS / "qwen2_vl_7b.py"), *arguments]) == 0
    assert "fits" in capsys.readouterr().out
