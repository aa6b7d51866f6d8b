"""Judges: a server on this machine, a file exchange, a model of our own; what they cannot be got to say; restarts."""

import json
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import numpy as np
import pytest

from jaxmed.api import load
from jaxmed.config import MeshConfig
from jaxmed.errors import BadRecords, UserError
from jaxmed.evaluate import green, judges, judging
from jaxmed.evaluate.endpoint import EndpointJudge
from jaxmed.evaluate.studies import Study
from jaxmed.sharding import make_mesh

GOOD = "[Clinically Significant Errors]:\n(a) Kind: {}. x\n\n[Matched Findings]:\n1. y"


class Server:
    """Chat completions by a function of the prompt: a text, a status to answer with, or seconds to be silent."""

    def __init__(self, answer):
        self.prompts, self.bodies, self.headers = [], [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][-1]["content"]
                outer.prompts.append(prompt)
                outer.bodies.append(body)
                outer.headers.append((self.path, dict(self.headers)))
                said = answer(prompt)
                if isinstance(said, float):
                    time.sleep(said)
                    said = "late"
                status, text = said if isinstance(said, tuple) else (200, said)
                reply = json.dumps({"choices": [{"message": {"content": text}}]}).encode() if status == 200 else b"{}"
                try:
                    self.send_response(status)
                    if status == 302:
                        self.send_header("Location", "http://127.0.0.1:9/v1")
                    self.send_header("Content-Length", str(len(reply)))
                    self.end_headers()
                    self.wfile.write(reply)
                except BrokenPipeError:
                    pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def serve():
    servers = []

    def start(answer):
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def endpoint(server, **more):
    return EndpointJudge(server.url, "judge-7b", sleep=lambda seconds: None, **({"timeout": 5.0} | more))


def studies(count=6):
    return [Study(f"s{i}", f"v{i}.nii.gz", ("<image>\nReport?",), (f"answer {i}",), (f"reference {i}",)) for i in range(count)]


def ask(asked, judge, path, skip=True, settings=None):
    kept = judging.Kept(str(path), judge.name)
    return judging.ask(asked, judge, kept, settings or judging.Settings(), skip, lambda done, total: None)


def test_a_server_is_asked_greedily_and_with_the_key_and_only_there(serve):
    server = serve(lambda prompt: "fine")
    judge = endpoint(server, key="secret")
    assert judge.complete(["first", "second"]) == ["fine", "fine"] and server.prompts == ["first", "second"]
    path, headers = server.headers[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert (
        server.bodies[0]["temperature"] == 0
        and "max_tokens" not in server.bodies[0]
        and server.bodies[0]["model"] == "judge-7b"
    )
    assert not judge.is_remote and "secret" not in judge.name
    assert EndpointJudge("https://example.org/v1", "m").is_remote
    elsewhere = endpoint(serve(lambda prompt: (302, "")))
    with pytest.raises(judges.JudgeError, match="302"):
        elsewhere.complete(["not to be sent on"])


def test_a_busy_server_is_asked_again_and_a_silent_one_is_told(serve):
    said = iter([(503, ""), (429, ""), "at last"])
    assert endpoint(serve(lambda prompt: next(said))).complete(["p"]) == ["at last"]
    refused = serve(lambda prompt: (401, ""))
    with pytest.raises(judges.JudgeError, match="401"):
        endpoint(refused).complete(["p"])
    assert len(refused.prompts) == 1  # a key that is wrong will not be right the next time
    silent = serve(lambda prompt: 1.0)
    with pytest.raises(judges.JudgeError, match=r"no answer within 0\.1 s, 3 times"):
        endpoint(silent, timeout=0.1).complete(["p"])
    with pytest.raises(judges.JudgeError, match="cannot be reached"):
        EndpointJudge("http://127.0.0.1:9", "m", sleep=lambda seconds: None).complete(["p"])


@pytest.mark.parametrize(("url", "match"), [("ftp://x", "give an address"), ("http://me:pw@host/v1", "holds a password")])
def test_addresses_that_cannot_be_used(url, match):
    with pytest.raises(UserError, match=match):
        EndpointJudge(url, "m")


def test_what_is_missing_is_asked_again_and_nothing_else(serve, tmp_path):
    fail = {"answer 1": 0.6, "answer 4": "I am a teapot"}

    def answer(prompt):
        bad = next((said for text, said in fail.items() if text in prompt), None)
        return GOOD.format(prompt.split("answer ")[1][0]) if bad is None else bad

    server, asked = serve(answer), judging.questions(studies(), judging.Settings())
    replies, problems = ask(asked, endpoint(server, timeout=0.2), tmp_path / "judge.jsonl")
    assert [str(problem) for problem in problems] == [
        "study 's1': green: the judge did not answer: judge-7b at "
        f"127.0.0.1:{server.http.server_port}: no answer within 0.2 s, 3 times",
        "study 's4': green: the judge's reply is no judgment ('I am a teapot')",
    ]
    found = judging.results(studies(), asked, replies, "j", judging.Settings())[0]
    expected = [1, np.nan, 1 / 3, 1 / 4, np.nan, 1 / 6]
    np.testing.assert_allclose(found.values, expected)
    assert found.asked == 6 and found.answered == 4
    fail.clear()
    server.prompts.clear()
    with open(tmp_path / "judge.jsonl", "a") as file:
        file.write('{"key": "torn')  # the process died while it wrote
    replies, problems = ask(asked, endpoint(server), tmp_path / "judge.jsonl")
    assert not problems and len(server.prompts) == 2 and all(f"answer {i}" in "".join(server.prompts) for i in (1, 4))
    ask(asked, endpoint(server), tmp_path / "judge.jsonl")
    assert len(server.prompts) == 2
    other = EndpointJudge(server.url, "another", timeout=5)
    ask(asked, other, tmp_path / "judge.jsonl")
    assert len(server.prompts) == 8  # another judge's replies are not this one's


def test_stop_ends_at_the_first_fault_and_keeps_what_was_said(serve, tmp_path):
    server = serve(lambda prompt: "nonsense" if "answer 2" in prompt else GOOD.format(0))
    asked = judging.questions(studies(), judging.Settings())
    with pytest.raises(
        BadRecords, match=r"1 answer could not be judged; the same command asks for it again(.|\n)*study 's2': green"
    ):
        ask(asked, endpoint(server, parallel=1), tmp_path / "judge.jsonl", skip=False)
    assert len(server.prompts) == 3 and len((tmp_path / "judge.jsonl").read_text().splitlines()) == 2
    zero = judging.Settings(zero=True)
    replies, problems = ask(asked, endpoint(server, parallel=1), tmp_path / "judge.jsonl", False, zero)
    values = judging.results(studies(), asked, replies, "j", zero)[0].values
    assert not problems and values.tolist() == [1, 1, 0, 1, 1, 1]
    replies, problems = ask(asked, endpoint(server, parallel=1), tmp_path / "judge.jsonl")
    values = judging.results(studies(), asked, replies, "j", judging.Settings())[0].values
    assert len(problems) == 1 and np.isnan(values[2])  # what counted 0 then is none now


class Slow:
    """Judges `answer 0` never, all others at once."""

    name, batch, parallel, may_be_absent = "slow", 1, 2, True

    def __init__(self, said):
        self.said, self.never = said, threading.Event()

    def complete(self, prompts):
        if "answer 0" in prompts[0]:
            self.never.wait(30)
        if isinstance(self.said, Exception):
            raise self.said
        return [self.said]


def test_calls_under_way_are_not_waited_for(tmp_path):
    asked = judging.questions(studies(), judging.Settings())
    begin = time.monotonic()
    with pytest.raises(BadRecords, match=r"study 's1': green: the judge's reply is no judgment \('nonsense'\)"):
        ask(asked, Slow("nonsense"), tmp_path / "judge.jsonl", skip=False)
    with pytest.raises(ZeroDivisionError):  # what is no fault of the judge is not taken for one
        ask(asked, Slow(ZeroDivisionError()), tmp_path / "judge.jsonl")
    said = []

    def interrupted(done, total):
        said.append(done)
        if done == 5:
            raise KeyboardInterrupt

    kept = judging.Kept(str(tmp_path / "judge.jsonl"), "slow")
    with pytest.raises(KeyboardInterrupt):
        judging.ask(asked, Slow(GOOD.format(1)), kept, judging.Settings(), True, interrupted)
    assert time.monotonic() - begin < 10
    # an answer that comes late holds no other back: all five were kept
    assert len((tmp_path / "judge.jsonl").read_text().splitlines()) == 5


def test_an_absent_judge_is_given_up(tmp_path):
    judge = EndpointJudge("http://127.0.0.1:9", "m", sleep=lambda seconds: None)
    with pytest.raises(UserError, match="none of the first 5 calls"):
        ask(judging.questions(studies(40), judging.Settings()), judge, tmp_path / "judge.jsonl")


def test_file_exchange(tmp_path):
    asked = judging.questions([*studies(3), studies(1)[0]], judging.Settings(("green", "percentage")))
    assert len(asked) == 8
    assert judging.write_requests(str(tmp_path / "out.jsonl"), asked) == 6  # the same question is asked once
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert rows[0]["study"] == "s0" and "reference 0" in rows[0]["prompt"]
    said = {"green": GOOD.format(3), "percentage": "Score: 70."}
    lines = [json.dumps({"key": row["key"], "answer": said[row["measure"]], "judge": "radiologist"}) for row in rows[:-1]]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    judge = judges.FileJudge(str(tmp_path / "in.jsonl"))
    settings = judging.Settings(("green", "percentage"))
    replies, problems = ask(asked, judge, tmp_path / "judge.jsonl", settings=settings)
    assert len(problems) == 1 and problems[0].where == "study 's2'" and "none for the key" in problems[0].what
    measured = judging.results([*studies(3), studies(1)[0]], asked, replies, judge.name, settings)
    np.testing.assert_allclose(measured[0].values, [0.25] * 4)
    np.testing.assert_allclose(measured[1].values, [0.7, 0.7, np.nan, 0.7])
    assert measured[0].judge == "radiologist"
    (tmp_path / "bad.jsonl").write_text('{"key": "a"}\n')
    with pytest.raises(UserError, match="keep the keys"):
        judges.FileJudge(str(tmp_path / "bad.jsonl"))


def test_files_of_answers_that_are_odd(tmp_path):
    asked = judging.questions(studies(8), judging.Settings())
    path = tmp_path / "in.jsonl"

    def answers(rows, skip=True):
        # what others write: a byte order mark, letters as they are, other ends of lines within texts
        lines = [json.dumps({"key": key, "answer": text + "\u2028\x85"}, ensure_ascii=False) for key, text in rows]
        path.write_text("\n".join(lines), encoding="utf-8-sig")
        judge = judges.FileJudge(str(path))
        kept = judging.Kept(str(tmp_path / "judge.jsonl"), judge.name, anew=True)
        replies, problems = judging.ask(asked, judge, kept, judging.Settings(), skip, lambda done, total: None)
        values = judging.results(studies(8), asked, replies, judge.name, judging.Settings())[0].values
        return values, problems, judge.notices(q.prompt for q in asked)

    keys = [judges.prompt_key(q.prompt) for q in asked]
    rows = [(key, GOOD.format(i)) for i, key in enumerate(keys)]
    values, problems, notices = answers(rows[::-1])
    np.testing.assert_allclose(values, 1 / (1 + np.arange(8)))
    assert not problems and not notices
    # the first six are missing, which means nothing in a file; one is answered twice, one was not asked
    values, problems, notices = answers([*rows[6:], ("other", "x"), (keys[7], GOOD.format(0)), rows[6]])
    assert [problem.where for problem in problems] == [f"study 's{i}'" for i in range(6)]
    assert values[6] == 1 / 7 and values[7] == 1  # not what judge.jsonl has from the time before
    assert notices == [
        f"{path}: 1 of 3 answers are to questions that were not asked, such as other",
        f"{path}: 1 keys have several answers that differ, such as {keys[7]}; the last counts",
    ]
    assert len((tmp_path / "judge.jsonl").read_text().splitlines()) == 8 + 1
    with pytest.raises(UserError, match=r"none of 8 calls; .*--green-version"):
        answers([("other", "x")])


def test_who_is_asked_about():
    report, empty = studies(2)
    empty = Study("e", "v", ("q",), ("a",), (" ",))
    choice = Study("c", "v", ("q",), ("A",), ("A",), options={"A": "x", "B": "y"}, letter="A")
    opened = Study("o", "v", ("q",), ("left",), ("left lung",), question_type="3")
    asked = judging.questions([report, empty, choice, opened], judging.Settings(("green", "percentage")))
    assert [(q.name, q.measure) for q in asked] == [("s0", "green"), ("s0", "percentage"), ("o", "percentage")]


def test_a_model_of_ours_gets_the_published_chat_with_an_end_token_behind_it():
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
    model = load("tests/golden/vit3d/base", mesh=mesh, dtype="float32")
    judge, end = judges.LocalJudge(model, "tiny", batch=2, length=70), model.tokenizer.eos_ids[0]
    text = green.chat("left lung", model.tokenizer.piece(end))
    ids = judge.ids("left lung")
    assert ids[-1] == end and ids.tolist()[: len(model.tokenizer.encode(text))] == model.tokenizer.encode(text)
    replies = judge.complete(["left lung", "normal"])
    assert len(replies) == 2 and all(isinstance(reply, str) for reply in replies)
    spoken = model.generate([None], [judge.ids("normal")], max_new_tokens=70 - len(judge.ids("normal")), batch=2)[0]
    assert replies[1] == spoken.text
    programs = model.engine.compilations
    judge.complete(["left lung is", "left lung"])  # another prompt's length is no reason for another program
    assert model.engine.compilations == programs
    long = judge.ids("word " * 100)
    assert len(long) == 70 and long[-1] == end
    with pytest.raises(judges.JudgeError, match="fills the judge's 70 tokens"):
        judge.complete(["word " * 100])


def test_another_model_is_asked_in_its_own_chat():
    class Model:
        @staticmethod
        def prompt(image, text):
            assert image is None
            return types.SimpleNamespace(ids=np.arange(len(text), dtype=np.int32))

    judge = judges.LocalJudge(Model(), "other", length=7, own_chat=True)
    assert judge.ids("four").tolist() == [0, 1, 2, 3] and len(judge.ids("nine words")) == 7
    assert judge.name == "other, its own chat template"
