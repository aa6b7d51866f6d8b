"""Upstream's own numbers (tests/golden/btb3d) through jaxmed.load: image tokens, logits, greedy ids, losses, gradients, ids.

Tolerances are those of case.json. Answers of later turns are covered with the commands.
"""

import json
from pathlib import Path

import numpy as np
import pytest

import jaxmed

GOLDEN = Path(__file__).parent.parent / "golden" / "btb3d"
CASE = json.loads((GOLDEN / "case.json").read_text())
CHECKS = {check["name"]: check for check in CASE["checks"]}
RUNS = ("zero2", "zero3", "m72")


def read(path: str):
    file = GOLDEN / path
    return json.loads(file.read_text()) if file.suffix == ".json" else np.load(file, allow_pickle=False)


def close(ours, wanted, check: dict, what: str = "") -> None:
    np.testing.assert_allclose(ours, wanted, atol=check.get("atol", 0.0), rtol=check.get("rtol", 0.0), err_msg=what)


@pytest.fixture(scope="module")
def models():
    """Loaded once a run; in float32."""
    known = {}

    def of(run: str):
        if run not in known:
            known[run] = jaxmed.load(
                GOLDEN / CASE["runs"][run]["model"], base=GOLDEN / CASE["runs"][run]["base"], dtype="float32"
            )
        return known[run]

    return of


def rows_of(check: str) -> list[dict]:
    return read(CHECKS[check]["golden"])


def image_of(run: str, row: dict) -> str:
    return str(GOLDEN / CASE["runs"][run]["embeddings"] / row["image"])


def last_logits(model, run: str, rows: list[dict]) -> np.ndarray:
    """At the last position of each prompt, given as ids, history included."""
    images, prompts = [image_of(run, r) for r in rows], [np.asarray(r["prompt_ids"]) for r in rows]
    found = model.logits(images, prompts)
    assert [len(x) for x in found] == [r["sequence_length"] for r in rows]
    return np.stack([x[-1] for x in found])[:, : CASE["base_vocab_size"]]


@pytest.mark.parametrize("name", [name for name in CHECKS if name.startswith("image_tokens")])
def test_image_tokens(models, name):
    check = CHECKS[name]
    run = check["run"]
    records = {r["id"]: r for r in read(CASE["runs"][run]["records"])}
    record = records[name.removeprefix("image_tokens_").removeprefix(f"{run}_")]
    path = str(GOLDEN / CASE["runs"][run]["embeddings"] / record["image"])
    close(models(run).image_tokens([path])[0], read(check["golden"]), check)


@pytest.mark.parametrize(
    ("name", "sample"), [("logits_prefill", "report_generation_21"), ("logits_prefill_m72", "long_answer_57")]
)
def test_logits_along_a_prompt(models, name, sample):
    """The prompt as words, tokenised here."""
    check = CHECKS[name]
    row = next(r for r in rows_of(f"generate_{check['run']}") if r["id"] == sample)
    (ours,) = models(check["run"]).logits([image_of(check["run"], row)], [row["question"]])
    close(ours[:: check["stride"][0], : check["columns"]], read(check["golden"]), check)


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("logits_last", "generate_zero2_upstream_bytes"),
        ("logits_last_stripped_history", "generate_zero2"),
        ("logits_last_zero3", "generate_zero3"),
        ("logits_last_m72", "generate_m72"),
    ],
)
def test_logits_at_the_end_of_every_prompt(models, name, answers):
    check, rows = CHECKS[name], rows_of(answers)
    close(last_logits(models(check["run"]), check["run"], rows), read(check["golden"]), check)


def test_a_conversation_gives_the_prompts_ids(models):
    """History turns re-tokenised from their text, the answers without their end tokens."""
    model, before = models("zero2"), {}
    for row in rows_of("generate_zero2"):
        history = before.setdefault(row["id"], [])
        turns = [*history, {"from": "human", "value": row["question"]}]
        made = model.prompt(image_of("zero2", row), turns)
        assert made.ids.tolist() == row["prompt_ids"], (row["id"], row["turn"])
        before[row["id"]] = [*turns, {"from": "gpt", "value": row["answer_stripped"]}]
    assert max(len(turns) for turns in before.values()) > 2


def test_logits_that_chose_each_new_token(models):
    check = CHECKS["step_logits"]
    row = next(r for r in rows_of("generate_zero2_upstream_bytes") if r["id"] == "long_answer_80" and r["turn"] == 2)
    wanted = read(check["golden"])
    ids = np.asarray([*row["prompt_ids"], *row["token_ids"]])
    (ours,) = models("zero2").logits([image_of("zero2", row)], [ids])
    start = row["sequence_length"] - 1
    close(ours[start : start + len(wanted), : check["columns"]], wanted, check)


@pytest.mark.parametrize("run", RUNS)
def test_greedy_answers_of_the_first_turns(models, run):
    rows = [r for r in rows_of(f"generate_{run}") if r["turn"] == 0]
    model = models(run)
    made = model.generate(
        [image_of(run, r) for r in rows], [r["question"] for r in rows], max_new_tokens=CASE["runs"][run]["max_new_tokens"]
    )
    for row, answer in zip(rows, made, strict=True):
        assert answer.token_ids == row["token_ids"], row["id"]
        assert answer.text == row["answer_stripped"]
        assert (answer.finish_reason == "stop") == row["ended"]


@pytest.fixture(scope="module", params=[f"train_{run}" for run in RUNS])
def trained(request, models):
    """Loss and gradients of a training batch at the loaded weights, and upstream's."""
    described = CASE["runs"][request.param]
    records = read(described["records"])
    model = models(request.param.removeprefix("train_"))
    batch = [records[n] for n in described["batch"]]
    embeddings = str(GOLDEN / described["embeddings"])
    return request.param, model.loss(batch, gradients=True, embeddings=embeddings), model.tokens(batch)


def test_loss(trained):
    name, ours, _ = trained
    wanted = read(f"golden/{name}.json")
    close(ours.loss, wanted["loss"], CHECKS[f"{name}_loss"])
    assert ours.token_count == wanted["supervised_tokens"]


def test_gradients_and_their_norms(trained):
    name, ours, _ = trained
    wanted, check = read(f"golden/{name}.json"), CHECKS[f"{name}_grad_norms"]
    assert ours.gradients.keys() == wanted["grad_norms"].keys()
    for tensor, norm in wanted["grad_norms"].items():
        close(np.linalg.norm(ours.gradients[tensor]), norm, check, tensor)
    for part in ("lora", "projector", "embed_tokens"):
        if f"grad_norm_{part}" in check["keys"]:
            of_part = [g for tensor, g in ours.gradients.items() if part in tensor]
            close(np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in of_part)), wanted[f"grad_norm_{part}"], check, part)
    for tensor, gradient in read(f"golden/{name}_grads.npz").items():
        close(ours.gradients[tensor], gradient, CHECKS[f"{name}_grads"], tensor)


def test_ids_and_labels(trained):
    """Upstream pads its batch on the right, with the padding token and labels of -100."""
    name, _, ours = trained
    wanted = read(f"golden/{name}.json")
    for row, ids, labels in zip(ours, wanted["input_ids"], wanted["labels"], strict=True):
        n = len(row.token_ids)
        assert (row.token_ids, row.labels) == (ids[:n], labels[:n])
        assert set(ids[n:]) <= {432} and set(labels[n:]) <= {-100}
        assert not row.voided


def test_ids_and_labels_of_edge_cases(models):
    wanted, records = read(CHECKS["edge_tokens"]["golden"]), read(CASE["runs"]["edge"]["records"])
    for record, ours in zip(records, models("zero2").tokens(records), strict=True):
        name = record["id"]
        assert ours.token_ids == wanted["input_ids"][name], name
        assert ours.labels == wanted["labels"][name], name
        assert sum(x != -100 for x in ours.labels) == wanted["supervised_tokens"][name]
        assert ours.voided == (wanted["supervised_tokens"][name] == 0) and bool(ours.reason) == ours.voided
    assert sum(n == 0 for n in wanted["supervised_tokens"].values()) == 3


def test_decoded_text(models):
    golden = read(CHECKS["decode"]["golden"])
    tokenizer = models("zero2").tokenizer
    assert {name: tokenizer.decode(ids).strip() for name, ids in golden["ids"].items()} == golden["text"]
