"""The commands that use a run: chat, generate, evaluate, report."""

import io
import json
import os
import pty
import subprocess
import sys
import time

import jax
import PIL.Image
import pytest

import mm_jax
from mm_jax.cli.main import main
from mm_jax.data.messages import Box, Text
from mm_jax.inference.engine import Engine
from tests.tiny import tiny, user


@pytest.fixture
def typed(monkeypatch):
    """Lines of standard input, which is no terminal."""
    return lambda *lines: monkeypatch.setattr(
        sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines))
    )


def fails(capsys, *arguments) -> str:
    """The one line that a mistake of the user prints."""
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith(f"mm_jax {arguments[0]}: ") and error.count("\n") == 1 and "Traceback" not in error
    )
    return error


def test_generate_one_question(run, files, capsys):
    arguments = ["--image", f"{files}/0.png", "--prompt", "what colour", "--max-new-tokens", "8"]
    assert main(["generate", run, *arguments]) == 0
    line = json.loads(capsys.readouterr().out)
    lm = mm_jax.load(run)
    assert line["text"] == lm.chat([user("what colour", (0,))], 8)


def test_generate_tells_where_it_looked(run, files, tmp_path, capsys):
    arguments = ["--image", f"{files}/0.png", "--prompt", "what colour", "--max-new-tokens", "8"]
    assert main(["generate", run, *arguments, "--attention", str(tmp_path / "heat")]) == 0
    line = json.loads(capsys.readouterr().out)
    words = line["attention"]["words"]
    assert words and all(line["text"][word["start"] : word["end"]] == word["text"] for word in words)
    for k, word in enumerate(words):
        (image,) = word["images"]
        assert image["picture"] == str(tmp_path / "heat" / f"answer-{k}-0.png")
        assert PIL.Image.open(image["picture"]).size == (40, 24)
        assert sum(map(sum, image["weights"])) == pytest.approx(image["share"], rel=0.02)
    (tmp_path / "file").write_text("")
    assert "cannot write" in fails(capsys, "generate", run, *arguments, "--attention", tmp_path / "file")


def test_generate_a_file(run, files, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    arguments = [
        "--data",
        f"{files}/questions.jsonl",
        "--out",
        str(out),
        "--batch",
        "2",
        "--max-new-tokens",
        "8",
    ]
    assert main(["generate", run, *arguments]) == 0
    lines = [json.loads(text) for text in out.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["a", "b", "c"]
    assert lines[0]["text"] == mm_jax.load(run).chat([user("what colour", (0,))], 8)
    # one bad question costs only itself
    assert main(["generate", run, "--data", f"{files}/one_bad.jsonl", "--max-new-tokens", "8"]) == 2
    printed = capsys.readouterr()
    found = [json.loads(text) for text in printed.out.splitlines()]
    assert found[:3] == lines and "gone.png" in found[3]["error"]
    assert "gone.png: no such file" in printed.err.splitlines()[-1]


def test_integer_weights(run, files, tmp_path, capsys):
    question = ["--image", f"{files}/0.png", "--prompt", "what colour", "--max-new-tokens", "8"]
    exact = mm_jax.load(run).chat([user("what colour", (0,))], 8)
    answer = mm_jax.load(run, weights="int4").chat([user("what colour", (0,))], 8)
    assert answer != exact  # random weights: the two differ more than likely tokens do
    assert main(["generate", run, *question, "--weights", "int4"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == answer
    assert main(["chat", run, *question, "--weights", "int4"]) == 0
    assert capsys.readouterr().out.strip() == answer
    data = [
        "--data",
        f"{files}/questions.jsonl",
        "--no-blank",
        "--out",
        str(tmp_path),
        "--max-new-tokens",
        "6",
    ]
    assert main(["evaluate", run, *data, "--weights", "int4"]) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["weights"] == "int4"
    assert 'weights are "int9"; did you mean "int8"?' in fails(
        capsys, "generate", run, *question, "--weights", "int9"
    )


def test_chat_from_a_pipe(run, files, typed, capsys):
    typed("what colour", f"/audio {files}/1.wav", "which word", "", "/reset", "how many")
    assert main(["chat", run, "--image", f"{files}/0.png", "--max-new-tokens", "8"]) == 0
    answers = capsys.readouterr().out.splitlines()
    lm = mm_jax.load(run)
    session = lm.session()
    from mm_jax.data.messages import Audio, Image

    expected = [
        session.ask((Image(f"{files}/0.png"), Text("what colour")), max_new_tokens=8),
        session.ask((Audio(f"{files}/1.wav"), Text("which word")), max_new_tokens=8),
        lm.session().ask("how many", max_new_tokens=8),
    ]
    from mm_jax.inference.text import render

    assert "\n".join(answers).split() == " ".join(map(render, expected)).split()


def test_chat_goes_on_after_a_mistake(run, files, typed, capsys):
    typed(
        f"/image {files}/gone.png", f"/image {files}/text.png", "/imag x", "/image", "red " * 2000, "how many"
    )
    assert main(["chat", run, "--max-new-tokens", "8"]) == 2
    printed = capsys.readouterr()
    errors = printed.err.splitlines()
    for error, words in zip(
        errors,
        ("no such file", "not an image", 'did you mean "/image"', "needs a path", "over the limit"),
        strict=True,
    ):
        assert words in error
    assert printed.out.strip() == mm_jax.load(run).chat([user("how many")], 8)


def test_chat_stops_an_answer(run, typed, capsys, monkeypatch):
    """Ctrl-C in the middle of an answer: the answer ends, the chat goes on and knows what was said."""
    decode, calls = Engine._decode, []

    def interrupted(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return decode(self, *arguments, **options)

    monkeypatch.setattr(Engine, "_decode", interrupted)
    typed("what colour", "how many")
    assert main(["chat", run, "--max-new-tokens", "20"]) == 0
    stopped, _, rest = capsys.readouterr().out.partition(" (stopped)\n")
    assert rest.strip() and len(calls) > 4


def test_chat_prompts_and_boxes(run, files, tmp_path, capsys, monkeypatch):
    """Answers with boxes are printed in original pixels and drawn."""
    from mm_jax.data.processor import Processor

    answer = [Text("at"), Box((4.0, 4.0, 15.0, 15.0))]
    monkeypatch.setattr(Processor, "parts", lambda self, ids, transforms=(): answer if ids else [])
    out = tmp_path / "drawn.png"
    arguments = ["--image", f"{files}/0.png", "--prompt", "where", "--prompt", "again", "--draw", str(out)]
    assert main(["chat", run, *arguments, "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out == f"at [4, 4, 15, 15]\n({out})\n" * 2
    drawn = PIL.Image.open(out)
    assert drawn.size == (40, 24) and drawn.getpixel((4, 10)) == drawn.getpixel((14, 4)) == (220, 38, 38)


def test_chat_at_a_terminal(run):
    """A real terminal: a question, an answer, Ctrl-D."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "mm_jax", "chat", run, "--max-new-tokens", "8"]
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, close_fds=True)
    os.close(follower)
    seen = b""

    def until(mark: bytes, count: int) -> None:
        nonlocal seen
        limit = time.monotonic() + 120
        while seen.count(mark) < count and time.monotonic() < limit:
            seen += os.read(leader, 1000)

    try:
        until(b"\n> ", 1)
        os.write(leader, b"how many\n")
        until(b"\n> ", 2)
        os.write(leader, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(leader)
    text = seen.decode(errors="replace").replace("\r", "")
    assert "Ctrl-D leaves" in text and "Traceback" not in text


def test_evaluate_and_report(run, files, tmp_path, capsys):
    data = f"{files}/questions.jsonl"
    assert main(["evaluate", run, "--data", data, "--batch", "2", "--max-new-tokens", "6"]) == 0
    table = capsys.readouterr().out
    assert table.startswith("| task | n | model | blanked | chance |") and "| colour | 1 |" in table
    scores = json.loads(open(f"{run}/scores.json").read())
    assert (scores["run"], scores["stage"], scores["step"], scores["data"]) == ("tiny", "only", 1, data)
    assert open(f"{run}/scores.md").read() == table
    page = tmp_path / "page.html"
    assert main(["report", run, "--out", str(page), "--samples", "2"]) == 0
    assert "where is it" in page.read_text() and "data:image/png" in page.read_text()
    assert fails(capsys, "report", run, "--out", tmp_path / "no" / "page.html").endswith(
        "No such file or directory\n"
    )


def test_mistakes(run, blind_run, files, tmp_path, capsys):
    picture = ["--image", f"{files}/0.png"]
    empty = tmp_path / "empty"
    empty.mkdir()
    for command in ("chat", "generate", "evaluate", "report"):
        rest = ["--prompt", "x"] if command in ("chat", "generate") else []
        assert "is not a run directory" in fails(capsys, command, empty, *rest)
        assert "is not a run directory" in fails(capsys, command, tmp_path / "missing", *rest)
        assert "required: run" in fails(capsys, command)
    for command in ("chat", "generate"):
        ask = [run, "--prompt", "what colour"]
        assert "no such file" in fails(capsys, command, *ask, "--image", f"{files}/gone.png")
        assert "not an image" in fails(capsys, command, *ask, "--image", f"{files}/text.png")
        assert "not a readable WAV" in fails(capsys, command, *ask, "--audio", f"{files}/text.png")
        assert "no vision encoder" in fails(capsys, command, blind_run, "--prompt", "x", *picture)
        assert "no audio encoder" in fails(
            capsys, command, blind_run, "--prompt", "x", "--audio", f"{files}/0.wav"
        )
        assert "the question is empty" in fails(capsys, command, run, "--prompt", "  ", *picture)
        assert "over the limit of 1024" in fails(capsys, command, run, "--prompt", "red " * 2000)
        assert "temperature is -1.0" in fails(capsys, command, *ask, "--temperature", "-1")
        assert 'did you mean "--temperature"' in fails(capsys, command, *ask, "--temperatur=1")
        assert "invalid int value: 'x'" in fails(capsys, command, *ask, "--seed", "x")
        assert 'no stage "onyl"; did you mean "only"' in fails(capsys, command, *ask, "--stage", "onyl")
    assert "--prompt or --data" in fails(capsys, "generate", run)
    assert "go with --prompt" in fails(capsys, "generate", run, "--data", "x", *picture)
    assert "gone.jsonl" in fails(capsys, "generate", run, "--data", files / "gone.jsonl")
    assert "files, which have no held-out split" in fails(capsys, "evaluate", run)
    assert 'no source "nine"' in fails(capsys, "evaluate", run, "--sources", "nine")
    assert "--batch is 0" in fails(capsys, "evaluate", run, "--batch", "0")
    assert "--samples is 0" in fails(capsys, "report", run, "--samples", "0")
    assert "run first" in fails(capsys, "report", blind_run)


@pytest.mark.parametrize("command", ["chat", "generate", "evaluate", "report"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"example: python -m mm_jax {command} runs/quickstart" in capsys.readouterr().out


def test_importing_is_light():
    """`import mm_jax` and `--help` load neither jax nor the tokenizer."""
    code = (
        "import sys, mm_jax; assert 'load' in dir(mm_jax); import mm_jax.cli.chat, mm_jax.cli.evaluate; "
        "print([m for m in ('jax', 'flax', 'tokenizers', 'PIL', 'tensorflow_datasets') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    assert mm_jax.Text is Text
    with pytest.raises(AttributeError, match="nothing"):
        mm_jax.nothing  # noqa: B018


def test_inspect_a_run(run: str, capsys: pytest.CaptureFixture) -> None:
    """Parts and parameters add up, without a checkpoint being read."""
    assert main(["inspect", run]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line[0] != " ")
    config, params, _ = tiny()
    total = sum(x.size for x in jax.tree.leaves(params))
    assert lines["parameters"] == f"{total:,}" and lines["run"] == "tiny" and lines["stages"] == "only"
    assert lines["picture"].startswith(f"{config.image_tokens} tokens")
