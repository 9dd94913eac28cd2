"""Pictures of other hosts: only from hosts that are named, at public addresses, within size and time."""

import dataclasses
import http.server
import io
import socket
import threading
import time

import pytest

from mm_jax.data.media import decode_image
from mm_jax.errors import UserError
from mm_jax.serve.errors import ApiError
from mm_jax.serve.options import ServeOptions
from mm_jax.serve.remote import Remote, fetch_pictures, is_public
from mm_jax.serve.schema import check_messages
from tests.tiny import picture

LOCAL = Remote(("localhost", "127.0.0.1"), max_bytes=100_000, seconds=5, private=True)


class Pages(http.server.BaseHTTPRequestHandler):
    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        try:
            if self.path == "/endless":
                while True:
                    self.wfile.write(bytes(10_000))
            elif self.path == "/slow":
                for _ in range(100):
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    time.sleep(0.1)
            else:
                file = io.BytesIO()
                picture().save(file, "PNG")
                self.wfile.write(file.getvalue())
        except OSError:
            pass  # it has hung up

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def only_ipv4(monkeypatch):
    """localhost may be ::1 as well, where the server does not listen."""
    look_up = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: look_up(*a, **k | {"family": socket.AF_INET}))


def message(url):
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


def test_a_picture_takes_the_place_of_its_address(address):
    messages = message(f"{address}/picture.png") + message(f"{address}/to/{address}/picture.png")
    fetch_pictures(messages, LOCAL, 8)
    check_messages(messages, ServeOptions(remote=LOCAL))
    for each in messages:
        assert decode_image(each["content"][0]["image_url"]["url"]).tobytes() == picture().tobytes()


def test_nothing_is_fetched_by_default(address):
    Pages.asked.clear()
    messages = message(f"{address}/picture.png")
    fetch_pictures(messages, Remote(), 8)
    with pytest.raises(ApiError, match="fetches nothing"):
        check_messages(messages, ServeOptions())
    assert not Pages.asked


def test_private_addresses_are_refused_whatever_the_list_says(address):
    Pages.asked.clear()
    public = dataclasses.replace(LOCAL, private=False)
    for url in (address, address.replace("localhost", "127.0.0.1")):
        with pytest.raises(UserError, match="not a public address"):
            public.fetch(f"{url}/picture.png")
    assert not Pages.asked


def test_a_name_with_one_private_address_is_refused(monkeypatch):
    def look_up(*_, **__):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 80)) for ip in ("93.184.216.34", "10.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(UserError, match="not a public address"):
        Remote(("example.org",)).fetch("http://example.org/x.png")


def test_redirections_are_checked(address):
    for target in ("http://169.254.169.254/latest", "file:///etc/passwd", "http://evil.example/x"):
        with pytest.raises(UserError, match="not fetched|are fetched"):
            LOCAL.fetch(f"{address}/to/{target}")
    loop = "/to/" * 6 + "picture.png"
    with pytest.raises(UserError, match="redirections"):
        LOCAL.fetch(f"{address}{loop}")


@pytest.mark.parametrize(
    "url, match",
    [
        ("{}/missing", "404"),
        ("{}/endless", "more than 100000 bytes"),
        ("http://user:word@localhost/x", "without a user name"),
        ("http://other.example/x", '"other.example" are not fetched'),
        ("http://localhost.evil.example/x", "are not fetched"),
        ("http://localhost:1/x", "Refused"),
        ("http://localhost:99999999/x", "ValueError"),
        ("http:///x", "only http"),
        ("http://[::1/x", "ValueError"),
        ("{}/x\r\nHost: y", "InvalidURL"),
    ],
)
def test_what_cannot_be_fetched_is_one_line(address, url, match):
    with pytest.raises(UserError, match=match) as found:
        LOCAL.fetch(url.format(address))
    assert "\n" not in str(found.value)


def test_a_slow_picture_is_given_up(address):
    began = time.monotonic()
    with pytest.raises(UserError, match="not there within 0.5 s"):
        dataclasses.replace(LOCAL, seconds=0.5).fetch(f"{address}/slow")
    assert time.monotonic() - began < 4


def test_hosts():
    remote = Remote(("example.org", "*.wiki.org"))
    assert all(map(remote.allows, ("example.org", "EXAMPLE.org.", "upload.wiki.org")))
    assert not any(map(remote.allows, ("a.example.org", "wiki.org", "evilwiki.org", "example.org.evil.com")))


@pytest.mark.parametrize(
    "address, public",
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("::ffff:93.184.216.34", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:10.0.0.1", False),
        ("2002:0a00:0001::1", False),
        ("64:ff9b::a00:1", False),
    ],
)
def test_public_addresses(address, public):
    assert is_public(address) == public
