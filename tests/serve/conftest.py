"""A real server process on a real socket, in front of a tiny model with random weights."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import openai
import pytest
import soundfile

from tests.cli.conftest import make_run
from tests.tiny import clip, picture

KEY = "a secret"
LIMITS = [
    "--max-length",
    "1024",
    "--slots",
    "2",
    "--queue",
    "6",
    "--max-body",
    "0.2",
    "--max-pixels",
    "100000",
]


class Server:
    """The process, and what is asked of it without the official client."""

    def __init__(self, run: Path, *options: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = tempfile.TemporaryFile("w+")
        command = [sys.executable, "-m", "mm_jax", "serve", str(run), "--port", str(self.port), *options]
        self.process = subprocess.Popen(
            command,
            stdout=self.log,
            stderr=self.log,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait(self, seconds: float = 1800) -> "Server":
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            if self.process.poll() is not None:
                raise AssertionError(self.said())
            try:
                if self.get("/health")[0] == 200:
                    return self
            except OSError:
                pass
            time.sleep(0.2)
        raise AssertionError("the server does not get ready")

    def said(self) -> str:
        """What it has printed."""
        self.log.seek(0)
        return self.log.read()

    def get(self, path: str) -> tuple[int, str]:
        return self.send(path, None)

    def send(self, path: str, body: bytes | None, headers: dict | None = None) -> tuple[int, str]:
        """Status and body of a request; POST where there is a body."""
        headers = {"Authorization": f"Bearer {KEY}", **(headers or {})}
        request = urllib.request.Request(self.url + path, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def chat(self, **body: object) -> tuple[int, dict]:
        body = {"messages": [{"role": "user", "content": "how many"}], "max_tokens": 4} | body
        status, text = self.send("/v1/chat/completions", json.dumps(body).encode())
        return status, json.loads(text)

    def metric(self, name: str) -> float:
        lines = self.get("/metrics")[1].splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"mm_jax_{name}"))

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("serve") / "tiny")


@pytest.fixture(scope="session")
def server(run_dir: Path):
    server = Server(run_dir, "--api-key", KEY, *LIMITS)
    try:
        yield server.wait()
        assert server.stop() == 0
    finally:
        server.process.kill()


@pytest.fixture(scope="session")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=300)


@pytest.fixture(scope="session")
def lm(run_dir: Path):
    import mm_jax

    return mm_jax.load(run_dir)


def data_url(seed: int = 0) -> str:
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def sound(seed: int = 0) -> str:
    file = io.BytesIO()
    soundfile.write(file, clip(seed), 16_000, format="WAV")
    return base64.b64encode(file.getvalue()).decode()


def image_part(seed: int = 0) -> dict:
    return {"type": "image_url", "image_url": {"url": data_url(seed)}}


def audio_part(seed: int = 0) -> dict:
    return {"type": "input_audio", "input_audio": {"data": sound(seed), "format": "wav"}}


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}
