"""Who is there: processes that are to train together find each other, or say by name who is missing.

`jax.distributed` alone ends a process without a name when another one does not come. So process 0 first listens at the
coordinator's port itself, until every process has said its number and host there.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Mapping
from typing import Any

from mm_jax.errors import UserError

RETRY = 0.2  # seconds between two attempts to reach process 0
PATIENCE = 10.0  # seconds for one message


def roll_call(coordinator: str, count: int, index: int, timeout: float) -> list[str]:
    """Waits until `count` processes are there; their hosts, by number.

    Args:
      coordinator: "host:port" of process 0.
      index: of this process.
      timeout: seconds.

    Raises:
        UserError: some have not come (all that have get the same message), two have one number, or the port is taken.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f'the coordinator "{coordinator}" is not of the form host:port')
    deadline = time.monotonic() + timeout
    if index == 0:
        return _listen(int(port), count, timeout, deadline)
    return _call(host.strip("[]"), int(port), count, index, timeout, deadline)


def _listen(port: int, count: int, timeout: float, deadline: float) -> list[str]:
    here, callers = {0: socket.gethostname()}, []
    try:
        if socket.has_dualstack_ipv6():
            server = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
        else:
            server = socket.create_server(("", port))
    except OSError as error:
        raise UserError(f"process 0 cannot listen on port {port}: {error.strerror}") from None
    with server:
        while len(here) < count:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                caller, _ = server.accept()
            except TimeoutError:
                _refuse(callers, missing(here, count, timeout))
            caller.settimeout(PATIENCE)
            said = _read(caller)
            if said is None:  # nobody of ours
                caller.close()
                continue
            callers.append(caller)
            other, host, theirs = said["index"], said["host"], said["count"]
            if theirs != count or not 0 < other < count:
                _refuse(callers, f"process {other} on {host} is one of {theirs}, process 0 one of {count}")
            if other in here:
                _refuse(callers, f"two processes have the number {other}, on {here[other]} and on {host}")
            here[other] = host
        for caller in callers:
            _write(caller, {"hosts": [here[k] for k in range(count)]})
        for caller in callers:  # they hang up first, so that the port is free at once
            _read(caller)
            caller.close()
    return [here[k] for k in range(count)]


def _refuse(callers: list[socket.socket], message: str) -> None:
    for caller in callers:
        _write(caller, {"error": message})
        caller.close()
    raise UserError(message)


def _call(host: str, port: int, count: int, index: int, timeout: float, deadline: float) -> list[str]:
    name = socket.gethostname()
    while time.monotonic() < deadline:
        try:
            # it may take as long to come as we have waited
            with socket.create_connection((host, port), PATIENCE) as server:
                server.settimeout(timeout + PATIENCE)
                _write(server, {"index": index, "host": name, "count": count})
                said = _read(server)
        except OSError:  # not there yet, or its name is not known yet
            said = None
        if said is not None:
            if "error" in said:
                raise UserError(said["error"])
            return said["hosts"]
        time.sleep(RETRY)
    raise UserError(
        f"process 0 cannot be reached at {host}:{port} since {timeout:.0f} s (this is process {index} of {count} on "
        f"{name})"
    )


def _write(connection: socket.socket, value: dict[str, Any]) -> None:
    try:
        connection.sendall(json.dumps(value).encode() + b"\n")
    except OSError:
        pass  # it is gone; whoever waits for it will say so


def _read(connection: socket.socket) -> dict[str, Any] | None:
    """One line of JSON; None where there is none."""
    try:
        with connection.makefile() as file:
            return json.loads(file.readline())
    except (OSError, ValueError):
        return None


def missing(here: Mapping[int, str], count: int, timeout: float) -> str:
    """Who has not come, with the hosts where the environment knows them.

    >>> missing({0: "a", 2: "c"}, 4, 60)
    '2 of 4 processes have not come within 60 s: 1, 3; there are 0 (a), 2 (c)'
    """
    hosts = known_hosts(count, os.environ)
    absent = [k for k in range(count) if k not in here]
    names = ", ".join(f"{k} ({hosts[k]})" if hosts else str(k) for k in absent)
    present = ", ".join(f"{k} ({host})" for k, host in sorted(here.items()))
    return f"{len(absent)} of {count} processes have not come within {timeout:.0f} s: {names}; there are {present}"


def known_hosts(count: int, environment: Mapping[str, str]) -> list[str] | None:
    """The host of every process, as a TPU pod slice or Slurm gives it; None where that is not known.

    >>> known_hosts(4, {"SLURM_STEP_NODELIST": "gpu[08-09]"})
    ['gpu08', 'gpu08', 'gpu09', 'gpu09']
    """
    names = [name for name in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    if not names:
        for node in re.findall(r"[^,\[]+(?:\[[^\]]*\])?", environment.get("SLURM_STEP_NODELIST", "")):
            names += _expand(node)
    if not names or count % len(names):
        return None
    each = count // len(names)
    return [name for name in names for _ in range(each)]


def _expand(node: str) -> list[str]:
    """ "n[01-02,7]" -> n01, n02, n7."""
    start, _, ranges = node.rstrip("]").partition("[")
    if not ranges:
        return [start]
    found = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        found += [f"{start}{k:0{len(first)}}" for k in range(int(first), int(last or first) + 1)]
    return found
