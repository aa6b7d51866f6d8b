"""A judge's server that is busy, slow, wrong or gone: what is told, how often it is asked, and that the key stands nowhere."""

import email.utils
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jaxmed.errors import UserError
from jaxmed.evaluate import judging
from jaxmed.evaluate.endpoint import EndpointJudge
from jaxmed.evaluate.judges import JudgeError
from jaxmed.evaluate.studies import Study

KEY = "sk-71-secret"


def completion(text, **more):
    return json.dumps({"choices": [{"message": {"content": text}} | more]}).encode()


@pytest.fixture
def serve():
    """Starts a server whose replies come from a list, the last of them for ever: (status, headers, pieces of the body)."""
    servers = []

    def start(*replies):
        said = iter(replies)
        last = [replies[-1]]

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_POST(self):
                self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                status, headers, pieces = next(said, last[0])
                try:
                    self.send_response(status)
                    for name, value in ({"Content-Length": str(sum(map(len, pieces)))} | headers).items():
                        self.send_header(name, value)
                    self.end_headers()
                    for piece in pieces:
                        self.wfile.write(piece)
                        self.wfile.flush()
                        time.sleep(0.03 if pieces[1:] else 0)
                except OSError:
                    pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.bodies = []
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def judge(server, pauses=None, **more):
    sleep = (lambda seconds: None) if pauses is None else pauses.append
    return EndpointJudge(f"http://127.0.0.1:{server.server_port}/v1", "m", KEY, sleep=sleep, **({"timeout": 5.0} | more))


@pytest.mark.parametrize(
    ("asked", "pause"),
    [
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "1"}, 2),
        ({"Retry-After": "86400"}, 120),
        ({"Retry-After": "soon"}, 2),
        ({}, 2),
        ({"Retry-After": "Mon, 02 Jan 2006 15:04:05 GMT"}, 2),
    ],
)
def test_a_busy_server_is_left_alone_for_as_long_as_it_asks(serve, asked, pause):
    pauses = []
    server = serve((429, asked, [b"{}"]), (200, {}, [completion("well")]))
    assert judge(server, pauses).complete(["p"]) == ["well"] and pauses == [pause]


def test_a_date_to_come_back_at(serve):
    pauses = []
    when = email.utils.formatdate(time.time() + 40, usegmt=True)
    judge(serve((503, {"Retry-After": when}, [b""]), (200, {}, [completion("well")])), pauses).complete(["p"])
    assert 30 < pauses[0] <= 40


@pytest.mark.parametrize(
    ("reply", "told", "times"),
    [
        (
            (404, {}, [b'{"error": {"message": "The model `jugde` does\\nnot exist"}}']),
            "404 Not Found: The model `jugde` does not",
            1,
        ),
        ((422, {}, [b'{"detail": "no such field"}']), "422 Unprocessable Entity: no such field", 1),
        ((401, {}, [f"wrong key: Bearer {KEY}".encode()]), r"wrong key: Bearer \[key\]", 1),
        ((500, {}, [b"<html>oops</html>"]), "500 Internal Server Error: <html>oops</html>, 3 times", 3),
        ((200, {"Content-Length": "99"}, [b'{"choices": [{"mess']), "its answer broke off .*, 3 times", 3),
        ((200, {}, [completion("half")[:21]]), "no chat completion", 1),
        ((200, {}, [f'{{"your": "headers", "authorization": "{KEY}"}}'.encode()]), r"no chat completion: .*\[key\]", 1),
        ((200, {}, [b'{"choices": []}']), "no chat completion", 1),
        ((200, {}, [b" "] * 50 + [completion("dripping")]), r"no answer within 0\.4 s, 3 times", 3),
        ((200, {}, [completion("[Explanation]: it", finish_reason="length")]), "cut short after 17 characters", 1),
        ((200, {}, [completion(None, finish_reason="length")]), "cut short after 0 characters", 1),
    ],
)
def test_what_a_server_can_do_wrong_is_told_without_the_key(serve, reply, told, times):
    server = serve(reply)
    with pytest.raises(JudgeError, match=told) as error:
        judge(server, timeout=0.4).complete(["p"])
    assert KEY not in str(error.value) and len(server.bodies) == times


def test_an_address_without_its_end_is_told(serve):
    server = serve((404, {}, [b'{"detail": "Not Found"}']))
    with pytest.raises(
        JudgeError, match=r"404 Not Found \(at /chat/completions; mostly the address ends with /v1\): Not Found"
    ):
        EndpointJudge(f"http://127.0.0.1:{server.server_port}", "m").complete(["p"])


def test_a_bound_on_replies_is_asked_for_where_it_is_given(serve):
    server = serve((200, {}, [completion("well", finish_reason="stop")]))
    judge(server, tokens=77).complete(["p"])
    assert server.bodies[0]["max_tokens"] == 77


@pytest.mark.parametrize("key", ["sk-71\nX-Other: 1", "sk-71-é", "sk-71\x00"])
def test_a_key_that_no_header_takes_is_refused_unseen(key):
    with pytest.raises(UserError, match="set the variable") as error:
        EndpointJudge("http://localhost:1/v1", "m", key)
    assert "71" not in str(error.value)


def test_the_end_of_a_line_behind_a_key_is_no_part_of_it(serve):
    server = serve((200, {}, [completion("well")]))
    assert EndpointJudge(f"http://127.0.0.1:{server.server_port}", "m", f"{KEY}\r\n").complete(["p"]) == ["well"]


@pytest.mark.parametrize(
    ("host", "remote"),
    [("localhost", False), ("127.0.0.2", False), ("[::1]", False), ("127.example.org", True), ("10.0.0.7", True)],
)
def test_which_addresses_are_this_machine(host, remote):
    assert EndpointJudge(f"http://{host}:8000/v1", "m").is_remote is remote


def test_what_is_for_this_machine_goes_through_no_proxy(serve, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert judge(serve((200, {}, [completion("well")]))).complete(["p"]) == ["well"]


def test_a_server_that_dies_on_the_way_is_given_up_and_what_it_said_is_kept(serve, tmp_path):
    good = (200, {}, [completion("[Matched Findings]:\n1. x")])
    server = serve(*[good] * 7, (500, {}, [b""]))
    studies = [Study(f"s{i}", f"v{i}.npy", ("q",), (f"a{i}",), (f"r{i}",)) for i in range(60)]
    asked = judging.questions(studies, judging.Settings())
    kept = judging.Kept(str(tmp_path / "judge.jsonl"), "m")
    with pytest.raises(UserError, match=r"none of the last 20 calls; the last: .*judge\.jsonl, the same command"):
        judging.ask(asked, judge(server, parallel=1), kept, judging.Settings(), True, lambda done, total: None)
    assert len((tmp_path / "judge.jsonl").read_text().splitlines()) == 7 and len(server.bodies) == 7 + 3 * 20
