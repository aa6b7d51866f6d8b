"""Before the processes of a job join: are all there, do they agree on their number, do their clocks agree?

JAX's runtime aborts a process whose peers do not come, with a stack trace that names nobody, and Python cannot catch that. So
process 0 first listens at the coordinator's address, where each other process reports with a line of JSON (its index, the
number of processes, its host, its clock) and hears, once all have come, that the job begins or what is wrong. The port is then
JAX's.
"""

import dataclasses
import json
import selectors
import socket
import time
from collections.abc import Iterable

from jaxmed.cluster import Place
from jaxmed.errors import PeerError, UserError

SKEW_SECONDS = 60.0
"""Clocks further apart confuse checkpoints, logs and caches that go by time"""
_LINE = 4096
_PATIENCE = 2.0
"""Seconds for a line from somebody who has just connected"""


@dataclasses.dataclass
class Guest:
    """A process that reports to process 0."""

    process: int
    processes: int
    host: str
    skew: float
    """Seconds that its clock is ahead of process 0's"""
    line: socket.socket | None = None

    def __str__(self) -> str:
        return f"process {self.process} (on {self.host})"


def roll_call(place: Place, seconds: float) -> None:
    """Returns when all processes are there. PeerError if some are not after `seconds`; UserError if they don't fit together."""
    if place.process == 0:
        _preside(place, seconds)
    else:
        _report(place, seconds)


def _preside(place: Place, seconds: float) -> None:
    me = Guest(0, place.processes, socket.gethostname(), 0.0)
    with _listen(place) as server, selectors.DefaultSelector() as selector:
        guests = _receive(server, selector, me, time.monotonic() + seconds)
    error = _verdict(place, me, guests, seconds)
    answer = {"problem": str(error) if error else "", "code": error.code if error else 0}
    for guest in guests:
        _dismiss(guest, answer)
    if error:
        raise error


def _listen(place: Place) -> socket.socket:
    port = int(place.coordinator.rpartition(":")[2])
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except (OSError, OverflowError) as error:
        text = f"process 0 of {place.processes} cannot listen on port {port} of this host ({error}); end what uses it"
        raise UserError(f"{text}, or give all processes another port ({place.source})") from error


def _receive(server: socket.socket, selector: selectors.BaseSelector, me: Guest, deadline: float) -> list[Guest]:
    """Who has come when all have, when one does not fit in, or when time is up."""
    selector.register(server, selectors.EVENT_READ)
    guests: list[Guest] = []
    while len(guests) < me.processes - 1 and (left := deadline - time.monotonic()) > 0:
        for key, _ in selector.select(left):
            if key.fileobj is not server:  # nobody says a second line: this one has hung up
                selector.unregister(key.fileobj)
                key.fileobj.close()
                guests.remove(key.data)
            elif guest := _welcome(server):
                guests.append(guest)
                selector.register(guest.line, selectors.EVENT_READ, guest)
        if _misfits(me, guests):
            break
    return guests


def _welcome(server: socket.socket) -> Guest | None:
    """None for whoever is no process of jaxmed."""
    try:
        line, _ = server.accept()
    except OSError:
        return None
    line.settimeout(_PATIENCE)
    try:
        said = json.loads(line.makefile("rb").readline(_LINE))
        return Guest(int(said["process"]), int(said["processes"]), str(said["host"])[:80], said["clock"] - time.time(), line)
    except (OSError, ValueError, KeyError, TypeError):
        line.close()
        return None


def _misfits(me: Guest, guests: list[Guest]) -> list[str]:
    """What is wrong with those who have come."""
    wrong, seen = [], {0: me}
    for guest in guests:
        if guest.processes != me.processes:
            told = f"{guest} was told of {guest.processes} processes, process 0 (on {me.host}) of {me.processes}"
            wrong.append(f"{told}; give all the same number")
        elif other := seen.get(guest.process):
            twice = f"process {guest.process} was started twice, on {other.host} and on {guest.host}"
            wrong.append(f"{twice}; give each its own index")
        elif not 0 < guest.process < me.processes:
            wrong.append(f"{guest} is none of the {me.processes} processes")
        elif abs(guest.skew) > SKEW_SECONDS:
            way = "ahead of" if guest.skew > 0 else "behind"
            off = f"the clock of {guest} is {abs(guest.skew):,.0f} s {way} that of process 0 (on {me.host})"
            wrong.append(f"{off}; set it (NTP)")
        seen.setdefault(guest.process, guest)
    return wrong


def _verdict(place: Place, me: Guest, guests: list[Guest], seconds: float) -> UserError | None:
    if wrong := _misfits(me, guests):
        return UserError("; ".join(wrong))
    missing = sorted(set(range(1, place.processes)) - {guest.process for guest in guests})
    if not missing:
        return None
    here = ", ".join(str(guest) for guest in (me, *sorted(guests, key=lambda guest: guest.process)))
    return PeerError(
        f"{_listed(missing)} of {place.processes} did not come to {place.coordinator} within {seconds:g} s (there: {here}); "
        "see in their logs whether they run and know this address"
    )


def _listed(numbers: Iterable[int]) -> str:
    names = [str(number) for number in numbers]
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"process{'es' if len(names) > 1 else ''} {shown}"


def _dismiss(guest: Guest, answer: dict[str, str | int]) -> None:
    """Tells a process how it is, and lets it hang up first: the port is then free at once."""
    try:
        guest.line.sendall(json.dumps(answer).encode() + b"\n")
        guest.line.recv(1)
    except OSError:
        pass  # it is gone; the runtime will notice
    finally:
        guest.line.close()


def _report(place: Place, seconds: float) -> None:
    host, _, port = place.coordinator.rpartition(":")
    deadline = time.monotonic() + seconds
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=min(5.0, left)) as line:
                answer = _ask(line, place, seconds)
        except (OSError, ValueError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            time.sleep(min(0.3, max(deadline - time.monotonic(), 0.0)))
            continue
        if answer["problem"]:
            raise (UserError if answer["code"] == UserError.code else PeerError)(answer["problem"])
        return
    raise PeerError(
        f"process {place.process} of {place.processes}: the coordinator {place.coordinator} does not answer ({reason}, for "
        f"{seconds:g} s); check that process 0 runs there, that the address ({place.source}) is its host's, and that no "
        "firewall is between"
    )


def _ask(line: socket.socket, place: Place, seconds: float) -> dict[str, str | int]:
    said = {"process": place.process, "processes": place.processes, "host": socket.gethostname(), "clock": time.time()}
    line.sendall(json.dumps(said).encode() + b"\n")
    line.settimeout(seconds + _PATIENCE)  # process 0 has begun to wait, and waits no longer than that
    answer = json.loads(line.makefile("rb").readline(_LINE * 4))
    if not isinstance(answer, dict) or not {"problem", "code"} <= answer.keys():
        raise ValueError("something else listens there")
    return answer
