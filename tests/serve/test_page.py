"""The page in a real browser: pictures, streaming, boxes, heat maps, tool calls, sound, stop and retry."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from mm_jax.data.messages import Box, Conversation, Message, Text
from mm_jax.lm import LanguageModel
from tests.cli.conftest import write_run
from tests.serve.conftest import KEY, Server
from tests.tiny import clip, picture, random_params, tiny, user

playwright = pytest.importorskip(
    "playwright.sync_api", reason="the browser test needs: pip install playwright"
)
screenshots = pytest.importorskip("tests.serve.screenshots")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        screenshots.chromium() is None, reason="no chromium is installed (apt install chromium)"
    ),
]
BOX = (4, 6, 22, 19)
SAID = "a red square"


@pytest.fixture(scope="module")
def speaking_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that answers every question with "a red square" and a box.

    Nothing but the last token counts, as the branches of its decoder add nothing; the head knows what follows it. So
    the answer is known, and comes from a real model by real decoding.
    """
    config, _, processor = tiny()
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, tie_embeddings=False))
    params = random_params(config, 0)
    layers = params["decoder"]["layers"]
    for kernel in (layers["attention"]["out"], layers["mlp"]["down"]):
        kernel["kernel"] = jnp.zeros_like(kernel["kernel"])
    asked = user("what colour", (0,))
    answer = Message("assistant", (Text(SAID), Box(BOX)))
    whole = processor.example(Conversation((asked, answer)))
    first = processor.prompt([asked]).length
    chain = [int(token) for token in whole.tokens[first - 1 :]]
    assert len(set(chain[:-1])) == len(chain) - 1, "a token must say what follows it"
    table = np.asarray(params["decoder"]["embedding"]["embedding"])
    lines = table / np.sqrt(np.mean(table**2, axis=1, keepdims=True))
    head = np.zeros((table.shape[1], table.shape[0]), np.float32)
    for token, following in zip(chain[:-1], chain[1:], strict=True):
        head[:, following] += lines[token]
    params["decoder"]["head"]["kernel"] = jnp.asarray(head)
    lm = LanguageModel(config, params, processor)
    assert lm.chat([asked]).startswith(SAID) and lm.chat([user("how many circles")]).startswith(SAID)
    return write_run(tmp_path_factory.mktemp("page") / "speaking", config, params, processor)


@pytest.fixture(scope="module")
def served(speaking_run: Path):
    server = Server(speaking_run, "--api-key", KEY, "--max-length", "512", "--slots", "2")
    try:
        yield server.wait()
        assert server.stop() == 0
    finally:
        server.process.kill()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = screenshots.launch(driver)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, served: Server):
    """A phone-wide window with the key given; nothing is asked of another host, and no script fails."""
    context = browser.new_context(viewport={"width": 390, "height": 780})
    page = context.new_page()
    asked, failed = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.goto(served.url)
    playwright.expect(page.locator("#settings")).to_be_visible()  # as a key is needed
    page.fill("#key", KEY)
    page.press("#key", "Tab")
    playwright.expect(page.locator("#model")).to_have_text("speaking")
    page.click("#adjust")
    yield page
    assert not failed
    assert {url.split(":")[0] for url in asked} <= {"http", "data", "blob"}
    assert all(url.startswith((served.url, "data:", "blob:")) for url in asked)
    wide = page.evaluate("document.documentElement.scrollWidth")
    context.close()
    assert wide <= 390


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("files")
    for k in range(2):
        picture(k).save(root / f"{k}.png")
    soundfile.write(root / "sound.wav", clip(), 16_000)
    return [root / "0.png", root / "1.png", root / "sound.wav"]


def pixels(page, canvas) -> np.ndarray:
    """[height, width, 3] of a canvas."""
    size = canvas.evaluate("c => [c.height, c.width]")
    values = canvas.evaluate("c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]")
    return np.array(values, np.uint8).reshape(*size, 4)[..., :3]


def test_picture_answer_box_and_heat_map(page, files):
    page.evaluate(
        "new MutationObserver(() => (window.seen ||= []).push(document.querySelector('.assistant .text')?.textContent))"
        ".observe(document.querySelector('#talk'), {subtree: true, childList: true})"
    )
    answer = screenshots.ask(page, "what colour", files[0])
    text = answer.locator(".text").text_content()
    assert text.startswith(SAID) and "[" in text
    seen = page.evaluate("window.seen")
    pieces = [piece for piece in dict.fromkeys(seen) if piece and len(piece) < len(text)]
    assert pieces and all(text.startswith(piece) for piece in pieces)  # it came in pieces
    assert page.locator(".message.user img").count() == 1
    # the box of 40 x 24 original pixels, eight times as large
    canvas = answer.locator("canvas")
    shown = pixels(page, canvas)
    assert shown.shape == (192, 320, 3)
    pink = np.abs(shown.astype(int) - (0xE1, 0x1D, 0x48)).max(axis=-1) < 3
    rows, columns = np.flatnonzero(pink.any(axis=1)), np.flatnonzero(pink.any(axis=0))
    found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / 8
    np.testing.assert_allclose(found, BOX, atol=2)  # 16 bins over 40 pixels
    # a click on a word paints the picture, a second one takes it back
    word = answer.locator(".word", has_text="red")
    word.click()
    heat = pixels(page, canvas)
    assert canvas.get_attribute("data-look") == "red" and "red" in answer.locator("figcaption").text_content()
    assert (heat != shown).any(axis=-1).mean() > 0.5
    answer.locator(".word", has_text="square").click()
    assert canvas.get_attribute("data-look") == "square"
    answer.locator(".word", has_text="square").click()
    assert np.array_equal(pixels(page, canvas), shown)
    assert "tokens" in answer.locator(".bar").text_content()
    assert "tokens/s" in page.locator("#speed").text_content()


def test_two_pictures_and_a_second_turn(page, files):
    answer = screenshots.ask(page, "which", *files[:2])
    answer.locator(".word").first.click()
    assert answer.locator("canvas:visible").count() == 2  # both were looked at
    again = screenshots.ask(page, "how many")
    assert page.evaluate("messages.length") == 4 and again.locator(".word").count() >= 3


def test_sound(page, files):
    answer = screenshots.ask(page, "which word", files[2])
    assert page.locator(".message.user audio").count() == 1
    assert answer.locator(".text").text_content().startswith(SAID)
    assert answer.locator(".word").count() == 0  # there is no picture to look at


def test_a_video(page, tmp_path):
    """It goes to the server as it is; this model takes none, and the page says so."""
    pytest.importorskip("av")
    from tests.serve.test_videos import film

    (tmp_path / "a.mp4").write_bytes(film())
    with page.expect_request("**/v1/chat/completions") as sent:
        answer = screenshots.ask(page, "what happens", tmp_path / "a.mp4")
    part = sent.value.post_data_json["messages"][0]["content"][0]
    assert part["type"] == "video_url" and part["video_url"]["url"].startswith("data:video/mp4;base64,")
    assert page.locator(".message.user video").count() == 1
    assert "takes no videos" in answer.locator(".error").text_content()


def test_settings_reach_the_server(page, files):
    page.click("#adjust")
    page.fill("#max_tokens", "2")
    with page.expect_request("**/v1/chat/completions") as sent:
        answer = screenshots.ask(page, "how many")
    assert sent.value.post_data_json["max_tokens"] == 2
    assert "2 tokens" in answer.locator(".bar").text_content()
    page.fill("#temperature", "9")
    answer = screenshots.ask(page, "how many")
    assert "temperature" in answer.locator(".error").text_content()


def test_retry_and_new(page):
    screenshots.ask(page, "how many")
    page.locator(".retry").click()
    page.locator(".message.assistant.done").wait_for()
    assert page.evaluate("messages.length") == 2
    page.click("#new")
    assert page.locator(".message").count() == 0 and page.evaluate("messages.length") == 0


def test_stop(page, served):
    """A stream that has begun and does not go on by itself."""
    page.route("**/v1/chat/completions", lambda route: None)
    page.fill("#question", "how many")
    page.click("#send")
    playwright.expect(page.locator("#send")).to_have_text("Stop")
    page.click("#send")
    playwright.expect(page.locator("#send")).to_have_text("Send")
    assert "stopped" in page.locator(".message.assistant .bar").text_content()
    page.unroute("**/v1/chat/completions")
    page.locator(".retry").click()
    page.locator(".message.assistant.done .text", has_text=SAID).wait_for()


def test_tool_calls_are_cards(page):
    """What the server answers is made up here; what goes back is what the page makes of it."""
    call = '{"index": 0, "id": "c1", "type": "function", "function": {"name": "look", "arguments": "{\\"at\\": 3}"}}'
    body = f'data: {{"choices": [{{"index": 0, "delta": {{"tool_calls": [{call}]}}}}]}}\n\ndata: [DONE]\n\n'
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=200, content_type="text/event-stream", body=body),
        times=1,
    )
    answer = screenshots.ask(page, "look")
    card = answer.locator(".call")
    assert card.locator("b").text_content() == "look" and '"at": 3' in card.locator("pre").text_content()
    card.locator("input").fill("a blue circle")
    with page.expect_request("**/v1/chat/completions") as sent:
        page.get_by_text("Send results").click()
    said, result = sent.value.post_data_json["messages"][1:]
    assert said["tool_calls"][0]["function"] == {"name": "look", "arguments": '{"at": 3}'}
    assert result == {"role": "tool", "tool_call_id": "c1", "content": "a blue circle"}
    page.locator(".message.assistant.done").nth(1).wait_for()
