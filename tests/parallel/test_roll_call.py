"""Processes that find each other, and the messages when one is missing; threads stand for them here."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from pod import free_port

from mm_jax.errors import UserError
from mm_jax.parallel.processes import Place, find_place
from mm_jax.parallel.roll_call import known_hosts, roll_call

HOST = socket.gethostname()


def call(places: list[tuple[int, int]], timeout: float = 20) -> list[list[str] | str]:
    """What each (count, index) gets, hosts or the message of its error."""
    coordinator = f"127.0.0.1:{free_port()}"

    def one(place: tuple[int, int]) -> list[str] | str:
        try:
            return roll_call(coordinator, *place, timeout)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(one, places))


def test_all_hear_who_is_there() -> None:
    assert call([(4, 2), (4, 0), (4, 3), (4, 1)]) == [[HOST] * 4] * 4


def test_all_hear_who_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    message = f"2 of 4 processes have not come within 1 s: 1, 3; there are 0 ({HOST}), 2 ({HOST})"
    assert call([(4, 0), (4, 2)], 1) == [message] * 2
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "t0,t1,t2,t3")
    (message,) = call([(4, 0)], 1)
    assert (
        message == f"3 of 4 processes have not come within 1 s: 1 (t1), 2 (t2), 3 (t3); there are 0 ({HOST})"
    )


def test_without_the_first_one_nobody_waits_for_ever() -> None:
    (message,) = call([(2, 1)], 1)
    assert "process 0 cannot be reached at 127.0.0.1:" in message and "process 1 of 2" in message


def test_two_with_one_number_and_other_counts_are_mistakes() -> None:
    found = call([(3, 0), (3, 1), (3, 1)], 5)
    assert f"two processes have the number 1, on {HOST} and on {HOST}" in found
    found = call([(2, 0), (3, 1)], 5)
    assert set(found) == {f"process 1 on {HOST} is one of 3, process 0 one of 2"}


def test_a_port_that_is_taken_and_an_address_without_one() -> None:
    with socket.create_server(("", 0)) as other:
        with pytest.raises(UserError, match="process 0 cannot listen on port"):
            roll_call(f"127.0.0.1:{other.getsockname()[1]}", 2, 0, 1)
    with pytest.raises(UserError, match='"somewhere" is not of the form host:port'):
        roll_call("somewhere", 2, 0, 1)


def test_hosts_of_slurm() -> None:
    nodes = {"SLURM_STEP_NODELIST": "a,gpu[08-10,12],b[1]"}
    assert known_hosts(6, nodes) == ["a", "gpu08", "gpu09", "gpu10", "gpu12", "b1"]
    assert known_hosts(12, nodes)[:4] == ["a", "a", "gpu08", "gpu08"]
    assert known_hosts(7, nodes) is None and known_hosts(2, {}) is None


SLURM = {
    "SLURM_JOB_ID": "4096", "SLURM_STEP_NODELIST": "gpu[08-09]", "SLURM_NTASKS": "4", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}  # fmt: skip


def test_the_place_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_place() is None
    assert find_place("h:1", "4", "3") == Place("h:1", 4, 3)
    assert find_place("h:1", "1", "0") is None
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert find_place() == Place("gpu08:61440", 4, 3, (1,))
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert find_place() is None


@pytest.mark.parametrize(
    "given, message",
    [
        (("h:1", "", "0"), "--processes must be given as well"),
        (("", "2", "0"), "--coordinator must be given as well"),
        (("h:1", "2", "2"), "--process-id 2 is not one of --processes 2, counted from 0"),
        (("h:1", "two", "0"), "--process-id 0 is not one of --processes two"),
    ],
)
def test_half_a_place_is_a_mistake(given: tuple[str, str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_place(*given)
