"""`jaxmed generate` on AMOS-MM's schema: reports by region from one prefill of the volume, questions by likelihood, the
challenge's file; interrupted within a study."""

import contextlib
import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxmed
from jaxmed.cli.main import run
from jaxmed.config import MeshConfig
from jaxmed.data.amos import submission
from jaxmed.data.records import Reading, load_records
from jaxmed.errors import UserError
from jaxmed.evaluate.studies import read_answers
from jaxmed.generate.engine import Counts
from jaxmed.generate.submission import write_submission
from jaxmed.sharding import make_mesh

GOLDEN = Path(__file__).parents[1] / "golden" / "vit3d"
VOLUMES = {"s": "000459/Sagittal_bone_window.npy", "x": "013305/Axial_non-contrast.npy", "y": "004217/Axial_lung_window.npy"}
OPTIONS = {"A": "Liver", "B": "left kidney", "C": "Spleen"}
FINDINGS = {"s": {"chest": "Clear.", "abdomen": "Normal.", "pelvis": "Full."}, "x": {"abdomen": "Normal.", "pelvis": "Full."}}


pytestmark = pytest.mark.usefixtures("compiled_quickly", "on_one_device")


def entry(name: str) -> dict:
    def question(text: str, letter: str) -> dict:
        return {"question": text, "type": "organ", "options": OPTIONS, "answer": letter}

    qa = [question("Which organ is seen best?", "B"), question("Which one is cut by the lowest of all slices?", "C")]
    report = {"findings": FINDINGS.get(name, {"abdomen": "Normal."})}
    return {"image": f"./M3D_Cap_npy/ct_case/{VOLUMES[name]}", "meta": {}, "labels": {"report": report, "qa": qa}}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("amos") / "dataset.json"
    path.write_text(json.dumps({"training": [], "validation": [entry(name) for name in VOLUMES]}))
    return path


def command(records: str, out: Path, *more: str) -> list[str]:
    where = ["--volumes", str(GOLDEN / "data"), "--set", "vision.heads=3", "--dtype", "float32"]
    return ["generate", str(GOLDEN / "lamed_merged"), *where, "--records", records, "--out", str(out), *more]


def reports(dataset: Path, out: Path, *more: str) -> list[str]:
    return command(f"{dataset}:validation", out, "--max-new-tokens", "9", "--token-ids", *more)


@pytest.fixture(scope="module")
def written(dataset) -> tuple[Path, str]:
    """The result, and what was told on the way."""
    out, told = dataset.with_name("reports_vqa.json"), io.StringIO()
    with contextlib.redirect_stderr(told):
        assert run(reports(dataset, out)) == 0
    return out, told.getvalue()


@pytest.fixture(scope="module")
def shared(written) -> Path:
    return written[0]


@pytest.fixture(scope="module")
def model():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return jaxmed.load(str(GOLDEN / "lamed_merged"), mesh=mesh, dtype="float32", overrides={"vision.heads": 3})


def answers(path: Path) -> list[dict]:
    return [answer for study in json.loads(path.read_text()) for answer in study["conversations_out"]]


def test_a_volume_is_prefilled_once_for_all_its_regions(dataset, tmp_path, capsys, written, model):
    shared, together = written
    apart = tmp_path / "apart_vqa.json"
    assert run(reports(dataset, apart, "--batch", "1")) == 0
    alone = capsys.readouterr().err
    assert apart.read_bytes() == shared.read_bytes()
    found = answers(shared)
    assert [a["id"].split("/")[1] for a in found] == ["chest", "abdomen", "pelvis", "abdomen", "pelvis", "abdomen"]
    assert len({tuple(a["token_ids"]) for a in found}) > 3

    images = [str(GOLDEN / "data" / study["image"]) for study in json.loads(shared.read_text())]
    asked = [model.prompt(image, answer["question"]).ids.tolist() for image, answer in zip(images, found, strict=True)]
    total = sum(map(len, asked))
    common = next(n for n, ids in enumerate(zip(*asked, strict=False)) if len(set(ids)) > 1)
    assert common > 19, "placeholders and the words before the region"
    assert f"6 prompts of {total} tokens; {total - 3 * common} were prefilled" in together
    assert f"6 prompts of {total} tokens; {total} were prefilled" in alone


def test_a_study_whose_regions_are_half_done_goes_on(dataset, tmp_path, shared):
    """Two processes share volumes, not records; one had died within its first volume, and in the middle of a line."""
    out = tmp_path / "x_vqa.json"
    assert run(reports(dataset, out, "--process", "1", "--processes", "2")) == 0
    keys = [json.loads(line)["key"].split("/")[0] for line in Path(f"{out}.parts/1.jsonl").read_text().splitlines()]
    assert keys == ["Axial_non-contrast"] * 2 and not out.exists()
    lines = {json.loads(line)["key"]: line for line in Path(f"{shared}.parts/0.jsonl").read_text().splitlines(keepends=True)}
    kept, torn = "Sagittal_bone_window/abdomen", "Axial_lung_window/abdomen"
    part = Path(f"{out}.parts/0.jsonl")
    part.write_text(lines[kept] + lines[torn][:30])
    assert run(reports(dataset, out, "--process", "0", "--processes", "2")) == 0
    after = [json.loads(line)["key"] for line in part.read_text().splitlines()]
    mine = [key for key in lines if not key.startswith("Axial_non")]
    assert after[0] == kept and sorted(after) == sorted(mine), "what was done is not done again"
    assert out.read_bytes() == shared.read_bytes()


@pytest.fixture(scope="module")
def judged(dataset) -> Path:
    out = dataset.with_name("questions_vqa.json")
    assert run(command(f"{dataset}:validation:vqa", out, "--answers", "likelihood")) == 0
    return out


def test_questions_are_answered_by_likelihood(judged, model):
    found = json.loads(judged.read_text())
    letters = {letter: model.tokenizer.encode(f" {letter}", False) for letter in OPTIONS}
    for study in found:
        image, (answer,) = str(GOLDEN / "data" / study["image"]), study["conversations_out"]
        shares = {}
        for letter, ids in letters.items():
            logits = model.logits([image], [f"{answer['question']} {letter}"])[0]
            log_shares = np.asarray(jax.nn.log_softmax(logits, axis=-1))[-len(ids) - 1 : -1]
            shares[letter] = float(log_shares[np.arange(len(ids)), ids].sum())
            assert answer["log_likelihoods"][letter] == pytest.approx(shares[letter], abs=1e-4)
        assert answer["prediction"] == max(shares, key=shares.get)
        assert answer["answer"] == f"{answer['prediction']}. {OPTIONS[answer['prediction']]}"
        total = sum(np.exp(list(shares.values())))
        assert answer["probabilities"] == pytest.approx({k: np.exp(v) / total for k, v in shares.items()}, abs=1e-4)
    likelihoods = [written.likelihoods[0] for written in read_answers(str(judged))]
    assert [one.prediction for one in likelihoods] == [study["conversations_out"][0]["prediction"] for study in found]

    images = [str(GOLDEN / "data" / study["image"]) for study in found]
    questions = [study["conversations_out"][0]["question"].partition(" Choices:")[0] for study in found]
    again = model.answer(images, questions, [OPTIONS] * len(found))
    for choice, study in zip(again, found, strict=True):
        assert choice.probabilities == pytest.approx(study["conversations_out"][0]["probabilities"], abs=1e-6)
    by_text = model.answer(images, questions, [OPTIONS] * len(found), likelihood="texts", per_token=True)
    tokens = model.log_likelihoods(images[:1], [found[0]["conversations_out"][0]["question"]], [list(OPTIONS.values())])[0]
    for letter, each in zip(OPTIONS, tokens, strict=True):
        assert by_text[0].log_likelihoods[letter] == pytest.approx(float(each.sum()), abs=1e-4)
    means = np.exp([each.mean() for each in tokens])
    np.testing.assert_allclose(list(by_text[0].probabilities.values()), means / means.sum(), atol=1e-5)


def test_calibration_rewrites_the_finished_file_alone(dataset, judged, capsys):
    part, raw = Path(f"{judged}.parts/0.jsonl"), judged.read_bytes()
    before = part.read_bytes()
    again = command(f"{dataset}:validation:vqa", judged, "--answers", "likelihood")
    assert run([*again, "--calibration", "batch"]) == 0
    assert "6 questions with the options A, B, C are too few" in capsys.readouterr().err
    assert judged.read_bytes() == raw and part.read_bytes() == before


def test_the_challenges_file(dataset, judged, shared, tmp_path, capsys):
    out, asked = tmp_path / "submission.json", f"{dataset}:validation:vqa"
    more = ["--answers", "likelihood", "--submission", str(out), "--submission-with", str(shared)]
    assert run([*command(asked, judged), *more]) == 0
    made, skeleton = json.loads(out.read_text()), json.loads(dataset.read_text())
    assert [e["image"] for e in made["validation"]] == [e["image"] for e in skeleton["validation"]]
    texts, letters = ({a["id"]: a for a in answers(path)} for path in (shared, judged))
    for entry, name in zip(made["validation"], VOLUMES, strict=True):
        case = Path(entry["image"]).stem
        findings = entry["labels"]["report"]["findings"]
        assert {k: v for k, v in findings.items() if v} == {
            region: texts[f"{case}/{region}"]["answer"] for region in FINDINGS.get(name, ["abdomen"])
        }
        predicted = [item["prediction"] for item in entry["labels"]["qa"]]
        assert predicted == [letters[f"{case}/qa{n}"]["prediction"] for n in range(2)]
    predictions = {k: a["answer"] for k, a in texts.items()} | {k: a["prediction"] for k, a in letters.items()}
    assert made == submission(skeleton, predictions, "validation")


def test_end_tokens_are_not_submitted(dataset, tmp_path):
    records = [load_records(f"{dataset}:validation{task}", Reading(placeholders=True))[0] for task in ("", ":vqa")]
    for name, texts in (("r", records[0]), ("q", records[1])):
        said = [
            {"id": r.id, "question": "?", "answer": "The answer is b.</s>" if name == "q" else "Clear. </s>"} for r in texts
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps([{"image": "x", "conversations_out": [one]} for one in said]))
    results = [str(tmp_path / "r.json"), str(tmp_path / "q.json")]
    write_submission(str(tmp_path / "s.json"), f"{dataset}:validation", results, records[1], skip=False)
    made = [entry["labels"] for entry in json.loads((tmp_path / "s.json").read_text())["validation"]]
    assert {text for labels in made for text in labels["report"]["findings"].values()} == {"Clear.", ""}
    assert {item["prediction"] for labels in made for item in labels["qa"]} == {"B"}


def test_answers_that_name_no_option_are_told(dataset, tmp_path, capsys):
    """The small model writes nonsense: no letter can be submitted."""
    out = tmp_path / "x_vqa.json"
    asked = command(f"{dataset}:validation:vqa", out, "--max-new-tokens", "2", "--submission", str(tmp_path / "s.json"))
    assert run(asked) == 2
    message = capsys.readouterr().err
    assert message.count("names none of its options A, B, C; --answers likelihood") == 6
    assert not (tmp_path / "s.json").exists() and out.exists()
    assert run([*asked, "--on-bad-record", "skip"]) == 0
    assert "s.json is not whole" in capsys.readouterr().err
    left = [json.loads(line) for line in Path(f"{out}.skipped.jsonl").read_text().splitlines()]
    assert len(left) == 6 and all("is answered '', its options are A, B, C" in row["what"] for row in left)
    made = json.loads((tmp_path / "s.json").read_text())["validation"]
    assert [item["prediction"] for e in made for item in e["labels"]["qa"]] == [""] * 6


def test_a_python_session_reports_by_region(shared, model):
    model.engine.counts = Counts()
    image = str(GOLDEN / "data" / "M3D_Cap_npy" / "ct_case" / VOLUMES["s"])
    (found,) = model.reports([image], max_new_tokens=9)
    wanted = {a["id"].split("/")[1]: a["answer"] for a in answers(shared)[:3]}
    assert {region: generation.text for region, generation in found.items()} == wanted
    counts = model.engine.counts
    assert counts.answers == 3 and counts.prefilled < 0.6 * counts.prompted
    for few in ({}, {"A": "arterial"}):
        with pytest.raises(UserError, match=f"'Which phase.' has {len(few)} options; give two at least"):
            model.answer([image], ["Which phase?"], [few])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--per-token"], "--answers likelihood"),
        (["--calibration", "batch"], "--answers likelihood"),
        (["--submission-with", "x.json"], "belongs to --submission"),
        (["--submission", "s.json", "--submission-with", "absent.json"], "absent.json: no such file"),
    ],
)
def test_flags_that_do_not_go_together(flags, words, dataset, tmp_path, capsys):
    assert run(reports(dataset, tmp_path / "x_vqa.json", *flags)) == 2
    assert words in capsys.readouterr().err
