"""Pictures at addresses of other hosts: off unless hosts are named, and then with care.

An address leads to a request that this server makes, from inside of its network. So the host must be listed, all of its
IP addresses must be public, the connection goes to an address that was checked (a name may mean another one a moment
later), and every redirection is checked in the same way. No proxy is asked.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

from mm_jax.errors import UserError

_REDIRECTIONS = 3
_PIECE = 64 * 2**10


@dataclass(frozen=True)
class Remote:
    """What may be fetched.

    Attributes:
      hosts: names that are allowed; "*.example.org" stands for all below example.org. Empty: nothing is fetched.
      max_bytes: of one picture.
      seconds: for all pictures of a request, redirections included.
      private: also addresses that are not public; for tests.
    """

    hosts: tuple[str, ...] = ()
    max_bytes: int = 16 * 2**20
    seconds: float = 10.0
    private: bool = False

    def allows(self, host: str) -> bool:
        """Whether a name is listed; an IP address must be listed as such."""
        host = host.lower().rstrip(".")
        return any(
            host.endswith(name[1:]) if name.startswith("*.") else host == name
            for name in (name.lower() for name in self.hosts)
        )

    def fetch(self, url: str, limit: float | None = None) -> str:
        """The picture at an address as a data URL; what it is decides who decodes it.

        Args:
          limit: of `time.monotonic`, for the end.

        Raises UserError: an address that is not allowed, too large, too slow, or an answer that is no success.
        """
        limit = time.monotonic() + self.seconds if limit is None else limit
        try:
            for _ in range(_REDIRECTIONS + 1):
                found = self._request(url, limit)
                if isinstance(found, bytes):
                    return "data:application/octet-stream;base64," + base64.b64encode(found).decode()
                url = urljoin(url, found)
        except TimeoutError:
            raise UserError(f"{_short(url)}: not there within {self.seconds:g} s") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UserError(f"{_short(url)}: {type(error).__name__} while fetching it") from None
        raise UserError(f"{_short(url)}: more than {_REDIRECTIONS} redirections")

    def _request(self, url: str, limit: float) -> bytes | str:
        """The body, or where a redirection leads."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
            raise UserError(f"{_short(url)}: only http and https addresses without a user name are fetched")
        if not self.allows(parts.hostname):
            raise UserError(f'{_short(url)}: pictures of "{parts.hostname}" are not fetched')
        secure = parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        stream = self._connect(parts.hostname, port, limit)
        connection = http.client.HTTPConnection(parts.hostname, port)
        # the time-outs of a socket start anew with every byte
        alarm = threading.Timer(_left(limit), stream.shutdown, (socket.SHUT_RDWR,))
        alarm.daemon = True
        alarm.start()
        try:
            if secure:
                stream = ssl.create_default_context().wrap_socket(stream, server_hostname=parts.hostname)
            connection.sock = stream
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": "mm_jax"})
            answer = connection.getresponse()
            if answer.status in (301, 302, 303, 307, 308):
                return answer.getheader("Location") or ""
            if answer.status != 200:
                raise UserError(f"{_short(url)}: the answer is {answer.status}")
            return self._body(answer, url, limit)
        except (OSError, http.client.HTTPException):
            _left(limit)  # a connection that the alarm has cut is one that took too long
            raise
        finally:
            alarm.cancel()
            connection.close()
            stream.close()

    def _body(self, answer: http.client.HTTPResponse, url: str, limit: float) -> bytes:
        pieces, taken = [], 0
        while True:
            piece = answer.read1(_PIECE)
            _left(limit)
            if not piece:
                return b"".join(pieces)
            pieces.append(piece)
            taken += len(piece)
            if taken > self.max_bytes:
                raise UserError(f"{_short(url)}: more than {self.max_bytes} bytes")

    def _connect(self, host: str, port: int, limit: float) -> socket.socket:
        """A connection to an address that has been checked."""
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for *_, address in found:
            if not self.private and not is_public(address[0]):
                raise UserError(f'"{host}" is not a public address')
        failure: OSError = OSError("no address")
        for family, kind, protocol, _, address in found:
            stream = socket.socket(family, kind, protocol)
            try:
                stream.settimeout(_left(limit))
                stream.connect(address)
                return stream
            except OSError as error:
                stream.close()
                failure = error
        raise failure


def is_public(address: str) -> bool:
    """Whether an IP address is of the public internet; an IPv4 address inside of IPv6 counts as what it is."""
    found = ipaddress.ip_address(address.split("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = [found.ipv4_mapped, found.sixtofour, *(found.teredo or ())]
        low = int(found) & 0xFFFFFFFF
        if found in ipaddress.ip_network("64:ff9b::/96"):
            inner.append(ipaddress.IPv4Address(low))
        if not all(is_public(str(each)) for each in inner if each is not None):
            return False
        if found.ipv4_mapped is not None:
            return True
    return found.is_global and not found.is_multicast


def fetch_pictures(messages: Any, remote: Remote, most: int) -> None:
    """Replaces remote addresses of pictures in messages by what is there; what is not well-formed is left to others.

    Args:
      most: pictures of a request.
    """
    if not remote.hosts:
        return
    known: dict[str, str] = {}
    limit = time.monotonic() + remote.seconds
    for part in list(_pictures(messages))[:most]:
        inner = part.get("image_url")
        url = inner.get("url") if isinstance(inner, dict) else inner
        if isinstance(url, str) and _scheme(url) in ("http", "https"):
            if url not in known:
                known[url] = remote.fetch(url, limit)
            part["image_url"] = {"url": known[url]}


def _scheme(url: str) -> str:
    return url[:8].partition(":")[0].lower()


def _pictures(messages: Any) -> Iterable[Mapping[str, Any]]:
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and part.get("type") == "image_url":
                yield part


def _left(limit: float) -> float:
    left = limit - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _short(url: str) -> str:
    """For messages: one line."""
    url = "".join(letter if letter.isprintable() else "?" for letter in url[:101])
    return url if len(url) <= 100 else f"{url[:97]}..."
