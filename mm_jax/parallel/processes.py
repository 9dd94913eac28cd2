"""Several processes that train together: how they start, and what they tell each other besides arrays.

All of them call the functions here in the same order. With one process nothing is waited for.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
from jax._src import distributed  # its client is the only way to strings, barriers with names and time limits

from mm_jax.errors import UserError
from mm_jax.parallel.roll_call import roll_call

HEARTBEAT = 60  # seconds after which a process that was killed is missed
WAIT = 24 * 3600 * 1000  # milliseconds; whoever is gone is missed much earlier, by its heartbeat
POLL = 1.0  # seconds between two looks at whether another process has given up
FAILED = "mm_jax/failed"

_turns = itertools.count()


@dataclass(frozen=True)
class Place:
    """One process among those that train together.

    local_devices: numbers of the devices that are its own; None for all of its host.
    """

    coordinator: str
    count: int
    index: int
    local_devices: tuple[int, ...] | None = None


def find_place(coordinator: str = "", processes: str = "", process_id: str = "") -> Place | None:
    """What this process is told to be, or what its environment says: a TPU pod slice, GKE, Slurm or MPI.

    Returns None for a process alone.

    Raises:
        UserError: some of the arguments are missing or no numbers, or the environment does not tell enough.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process-id": process_id}
    if any(given.values()):
        absent = [name for name, value in given.items() if not value]
        if absent:
            raise UserError(
                f"{' and '.join(absent)} must be given as well: all of {', '.join(given)} or none"
            )
        if not (processes.isdigit() and process_id.isdigit() and int(process_id) < int(processes)):
            raise UserError(
                f"--process-id {process_id} is not one of --processes {processes}, counted from 0"
            )
        return Place(coordinator, int(processes), int(process_id)) if int(processes) > 1 else None
    from jax._src.clusters import ClusterEnv

    try:
        address, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, 300
        )
    except Exception as error:
        raise UserError(
            f"the environment looks like a cluster, but does not tell which process this is ({error}); give "
            f"{', '.join(given)}"
        ) from None
    if address is None or count is None or index is None or count == 1:
        return None
    return Place(address, count, index, tuple(devices) if devices else None)


def join(place: Place, timeout: float = 300.0) -> None:
    """Becomes one of the processes; to be called before any use of a device.

    Raises:
        UserError: some have not come within `timeout` seconds; they are named.
    """
    roll_call(place.coordinator, place.count, place.index, timeout)
    jax.distributed.initialize(
        place.coordinator,
        place.count,
        place.index,
        place.local_devices,
        initialization_timeout=int(timeout),
        heartbeat_timeout_seconds=HEARTBEAT,
    )
    threading.Thread(target=_watch, name="mm_jax-watch", daemon=True).start()


def _watch() -> None:
    """Ends this process when another one has given up: what that one does not send would be waited for."""
    while (client := distributed.global_state.client) is not None:
        try:
            message = client.key_value_try_get(FAILED)
        except jax.errors.JaxRuntimeError:  # nobody has
            time.sleep(POLL)
            continue
        author, code, text = message.split(" ", 2)
        if author != str(index()):
            print(f"mm_jax: {text}", file=sys.stderr, flush=True)
            _leave(int(code))
        return


def abandon(message: str, code: int) -> NoReturn:
    """Ends this process and all others, which say why, with an exit code."""
    told = f"process {index()} on {socket.gethostname()}: {message}"
    print(f"mm_jax: {told}", file=sys.stderr, flush=True)
    try:
        distributed.global_state.client.key_value_set(FAILED, f"{index()} {code} {told}")
    except jax.errors.JaxRuntimeError:
        pass  # another one was quicker
    _leave(code)


def _leave(code: int) -> NoReturn:
    if is_first():
        time.sleep(3 * POLL)  # the others hear of it by the service in this process
    os._exit(code)


def count() -> int:
    """Of all processes."""
    return jax.process_count()


def index() -> int:
    """Of this process."""
    return jax.process_index()


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return index() == 0


def gather(value: Any) -> list[Any]:
    """The JSON value of every process, by number."""
    if count() == 1:
        return [value]
    turn, client = next(_turns), distributed.global_state.client
    client.key_value_set(f"mm_jax/{turn}/{index():08}", json.dumps(value))
    client.wait_at_barrier(f"mm_jax/{turn}", WAIT)
    found = sorted(client.key_value_dir_get(f"mm_jax/{turn}/"))
    if is_first() and turn:  # nobody reads that any more
        client.key_value_delete(f"mm_jax/{turn - 1}/")
    return [json.loads(text) for _, text in found]


def agree(value: Any) -> Any:
    """The JSON value of process 0."""
    return gather(value if is_first() else None)[0]


def barrier() -> None:
    """Waits until all are here."""
    gather(None)


@contextmanager
def first() -> Iterator[bool]:
    """The block runs in process 0, then in all others: these find the files that it has written."""
    if not is_first():
        barrier()
    yield is_first()
    if is_first():
        barrier()


def once_a_host(make: Callable[[], Any]) -> None:
    """Calls `make` in process 0, then in one process of every other host: it writes to disks that may be shared."""
    hosts = gather(socket.gethostname())
    if is_first():
        make()
    barrier()
    if not is_first() and hosts.index(hosts[index()]) == index():
        make()
    barrier()
