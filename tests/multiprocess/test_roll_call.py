"""Processes report before they join: threads stand for them, on this machine's ports."""

import concurrent.futures
import json
import socket
import time

import pytest

from jaxmed import roll_call as module
from jaxmed.cluster import Place
from jaxmed.errors import REQUEUE, PeerError, UserError
from jaxmed.roll_call import roll_call


@pytest.fixture
def address() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def call(address: str, places: list[tuple[int, int]], seconds: float = 20.0) -> list[BaseException | None]:
    """What each (index, number of processes) came to."""
    with concurrent.futures.ThreadPoolExecutor(len(places)) as pool:
        calls = [pool.submit(roll_call, Place(address, count, process, "test"), seconds) for process, count in places]
        return [future.exception() for future in calls]


def test_all_are_there_and_the_port_is_free_afterwards(address: str) -> None:
    assert call(address, [(2, 3), (0, 3), (1, 3)]) == [None] * 3
    assert call(address, [(0, 2), (1, 2)]) == [None] * 2


def test_the_missing_are_named_by_all_who_came(address: str) -> None:
    came = call(address, [(0, 4), (2, 4)], seconds=1.0)
    assert all(isinstance(error, PeerError) and error.code == REQUEUE for error in came)
    for error in came:
        assert f"processes 1, 3 of 4 did not come to {address} within 1 s" in str(error)
        assert "process 2 (on " in str(error)


def test_a_coordinator_that_does_not_answer_is_named(address: str) -> None:
    began = time.monotonic()
    (error,) = call(address, [(1, 2)], seconds=1.0)
    assert isinstance(error, PeerError) and time.monotonic() - began < 3
    assert f"the coordinator {address} does not answer (Connection refused, for 1 s)" in str(error)
    (error,) = call("no-such-host.invalid:1234", [(1, 2)], seconds=0.3)
    assert "no-such-host.invalid:1234 does not answer" in str(error) and "\n" not in str(error)


def test_something_else_at_the_address_is_no_coordinator(address: str) -> None:
    with socket.create_server(("localhost", int(address.rpartition(":")[2]))) as server:
        server.settimeout(5)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            future = pool.submit(roll_call, Place(address, 2, 1, "test"), 0.2)
            line, _ = server.accept()
            line.sendall(b'"HTTP/1.1 400"\n')
            line.close()
            assert isinstance(future.exception(), PeerError)


def test_strangers_and_those_who_hang_up_do_not_count(address: str) -> None:
    port = int(address.rpartition(":")[2])
    gone = {"process": 1, "processes": 3, "host": "x", "clock": time.time()}
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        first = pool.submit(roll_call, Place(address, 3, 0, "test"), 20.0)
        for text in (b"GET / HTTP/1.1\r\n", b"[1, 2]\n", b'{"process": 1, "processes": 3}\n', b'{"process"'):
            with connected(port) as line:
                line.sendall(text)
        with connected(port) as line:  # reports, and dies before all are there
            line.sendall(json.dumps(gone).encode() + b"\n")
        time.sleep(0.1)
        others = [pool.submit(roll_call, Place(address, 3, process, "test"), 20.0) for process in (2, 1)]
        assert [call.exception() for call in (first, *others)] == [None] * 3


def connected(port: int) -> socket.socket:
    for _ in range(200):
        try:
            return socket.create_connection(("localhost", port))
        except OSError:
            time.sleep(0.02)
    raise AssertionError("nobody listens")


def test_another_number_of_processes_is_refused(address: str) -> None:
    first, second = call(address, [(0, 2), (1, 3)])
    assert type(first) is type(second) is UserError and first.code == 2
    for error in (first, second):
        assert "process 1 (on " in str(error) and "was told of 3 processes, process 0" in str(error)


def test_two_processes_of_one_index_are_refused(address: str) -> None:
    for error in call(address, [(0, 3), (1, 3), (1, 3)]):
        assert type(error) is UserError and "process 1 was started twice" in str(error)


def test_clocks_far_apart_are_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    port = int(address.rpartition(":")[2])
    for offset, told in ((75.0, "75 s ahead of"), (-62.0, "62 s behind"), (-55.0, "")):
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            first = pool.submit(roll_call, Place(address, 2, 0, "test"), 20.0)
            with connected(port) as line:
                said = {"process": 1, "processes": 2, "host": "late-host", "clock": time.time() + offset}
                line.sendall(json.dumps(said).encode() + b"\n")
                answer = json.loads(line.makefile().readline())
            error = first.exception()
        if not told:
            assert error is None and answer == {"problem": "", "code": 0}
            continue
        assert type(error) is UserError and str(error) == answer["problem"]
        assert "the clock of process 1 (on late-host) is" in str(error) and told in str(error)


def test_a_port_in_use_is_named(address: str) -> None:
    with socket.create_server(("", int(address.rpartition(":")[2]))):
        (error,) = call(address, [(0, 2)], seconds=1.0)
    assert type(error) is UserError and "process 0 of 2 cannot listen on port" in str(error)


def test_long_lists_of_missing_processes_are_short() -> None:
    assert module._listed(range(1, 20)) == "processes 1, 2, 3, 4, 5, 6, 7, 8 and 11 more"
