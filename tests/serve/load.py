"""Many clients at once against a running server: `python -m tests.serve.load http://127.0.0.1:8000 --clients 64`.

Every client sends one request after the other: text, a picture, two pictures, sound, or picture and sound; whole or
streamed, and some streams are left in the middle. What is measured: errors, answers, time to an answer, how evenly
clients are served, memory of the server (--pid) after the warm-up and at the end, and that no slot stays taken. With
--once the clients' requests are sent one at a time instead, to compare.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import threading
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from tests.serve.conftest import audio_part, image_part, text_part


@dataclass
class Tally:
    """What the clients have seen."""

    answers: list[int] = field(default_factory=list)  # of each client
    tokens: int = 0
    left: int = 0
    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def question(rng: random.Random) -> list[dict]:
    """A mixed question; few media are the same, so that encoders have work."""
    k = rng.randrange(10_000)
    media = rng.choice(
        [
            [],
            [image_part(k)],
            [image_part(k), image_part(k + 1)],
            [audio_part(k % 97)],
            [image_part(k), audio_part(k % 97)],
        ]
    )
    asked = rng.choice(
        ("how many shapes are there?", "which word do you hear?", "what colour is the circle?")
    )
    return [{"role": "user", "content": [*media, text_part(asked)]}]


class Load:
    """Clients of one server.

    Args:
      tokens: of each answer.
      leave: share of requests that are streams left in the middle.
    """

    def __init__(self, url: str, clients: int, tokens: int, leave: float, key: str = ""):
        parts = urlsplit(url)
        self.host, self.port, self.key = parts.hostname, parts.port, key
        self.tokens, self.leave = tokens, leave
        self.tally = Tally([0] * clients)
        self._lock = threading.Lock()

    def get(self, path: str) -> str:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        connection.request("GET", path, headers={"Authorization": f"Bearer {self.key}"})
        text = connection.getresponse().read().decode()
        connection.close()
        return text

    def metric(self, name: str) -> float:
        lines = self.get("/metrics").splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"mm_jax_{name}"))

    def ask(self, client: int, rng: random.Random) -> None:
        """One request, counted."""
        streamed, leaves = rng.random() < 0.5, rng.random() < self.leave
        body = {"messages": question(rng), "max_tokens": self.tokens, "ignore_eos": True, "temperature": 0.7}
        body |= {"stream": streamed or leaves}
        began = time.monotonic()
        connection = http.client.HTTPConnection(self.host, self.port, timeout=300)
        try:
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            answer = connection.getresponse()
            assert answer.status == 200, f"{answer.status}: {answer.read(500)!r}"
            if leaves:
                answer.read(300)
                with self._lock:
                    self.tally.left += 1
                return
            text = answer.read()
            whole = b"data: [DONE]" in text if streamed else json.loads(text)["usage"]
            assert whole and b'"error"' not in text, text[-500:]
            if not streamed:
                assert whole["completion_tokens"] == self.tokens
            with self._lock:
                self.tally.answers[client] += 1
                self.tally.tokens += self.tokens
                self.tally.seconds.append(time.monotonic() - began)
        except Exception as error:
            with self._lock:
                self.tally.errors.append(f"{type(error).__name__}: {error}")
        finally:
            connection.close()

    def run(self, seconds: float, together: bool = True, seed: int = 0) -> float:
        """Let the clients ask for so long, at once or in turns; returns how long it took until all had an answer."""
        began = time.monotonic()
        end = began + seconds
        count = len(self.tally.answers)
        numbers = [random.Random(1000 * seed + k) for k in range(count)]

        def client(k: int) -> None:
            while time.monotonic() < end:
                self.ask(k, numbers[k])

        if together:
            threads = [threading.Thread(target=client, args=(k,)) for k in range(count)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        else:
            k = 0
            while time.monotonic() < end:
                self.ask(k % count, numbers[k % count])
                k += 1
        return time.monotonic() - began

    def settled(self, seconds: float = 60) -> bool:
        """Whether all slots get free."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.metric("slots_used ") == 0 and self.metric("queue ") == 0:
                return True
            time.sleep(0.2)
        return False


def memory(pid: int) -> float:
    """Resident MiB of a process."""
    with open(f"/proc/{pid}/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def main(argv: list[str] | None = None) -> Tally:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--warm-up", type=float, default=30)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--leave", type=float, default=0.1)
    parser.add_argument("--key", default="")
    parser.add_argument("--pid", type=int, help="of the server, to read its memory")
    parser.add_argument("--once", action="store_true", help="one request at a time")
    options = parser.parse_args(argv)
    load = Load(options.url, options.clients, options.tokens, options.leave, options.key)
    load.run(options.warm_up, not options.once)
    tally = load.tally = Tally([0] * options.clients, errors=load.tally.errors)
    before = memory(options.pid) if options.pid else 0
    took = load.run(options.seconds, not options.once, seed=1)
    assert load.settled(), "a slot stays taken"
    ordered = sorted(tally.seconds)
    print(
        f"{sum(tally.answers)} answers and {tally.left} left streams of {options.clients} clients in {took:.1f} s: "
        f"{tally.tokens / took:.1f} tokens/s, {sum(tally.answers) / took:.2f} answers/s; {len(tally.errors)} errors"
    )
    if ordered:
        middle, late = ordered[len(ordered) // 2], ordered[int(0.99 * len(ordered))]
        print(f"an answer took {middle:.2f} s (middle), {late:.2f} s (99 %), {ordered[-1]:.2f} s (longest)")
    print(f"answers of a client: {min(tally.answers)} to {max(tally.answers)}")
    if options.pid:
        print(f"memory: {before:.0f} MiB after the warm-up, {memory(options.pid):.0f} MiB at the end")
    for error in tally.errors[:5]:
        print("error:", error)
    return tally


if __name__ == "__main__":
    main()
