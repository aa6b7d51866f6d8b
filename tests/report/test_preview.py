"""Preview: the token panel, the survey of a file, the volume panel, and the command."""

import dataclasses
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from jaxmed.cli import common
from jaxmed.cli import preview as command
from jaxmed.cli.validate import resolve
from jaxmed.config import EncodeConfig, PrepareConfig
from jaxmed.data.conversation import Example
from jaxmed.data.dataset import scan
from jaxmed.data.embeddings import write_npz
from jaxmed.data.metadata import Metadata
from jaxmed.data.tokenizer import IGNORE, IMAGE_ID, Tokenizer
from jaxmed.errors import UserError
from jaxmed.report import token_panel, volume_panel
from jaxmed.report.survey import survey

GOLDEN = Path(__file__).parents[1] / "golden" / "btb3d"
ADDED = ("<pad>", "<multiple_choice>", "<long_answer>", "<short_answe>", "<report_generation>")
ENCODE = EncodeConfig(canvas=(20, 16, 12), spacing=(4.0, 4.0, 5.0), levels=(2, 2, 2))

CONFIG = """
import dataclasses
from jaxmed._configs import btb3d
from jaxmed.config import DataConfig, EncodeConfig, VisualConfig

def get_config():
    return dataclasses.replace(
        btb3d.get_config(),
        visual=VisualConfig(tokens=30, features=18, grid=(3, 5, 2)),
        data=DataConfig(buckets=(96, 256), supervised=64),
        encode=EncodeConfig(canvas=(20, 16, 12), spacing=(4.0, 4.0, 5.0), levels=(2, 2, 2)),
    )
"""


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(str(GOLDEN / "base"), ADDED)


def example(ids, supervised):
    ids = np.array(ids, np.int32)
    return Example(ids, np.where(np.array(supervised), ids, IGNORE).astype(np.int32), "")


def test_tokens_fall_into_runs_and_places_count_past_the_image(tokenizer):
    text = tokenizer.encode("Normal chest.", False)
    ids = [*text, IMAGE_ID, *text]
    marks = [False] * (len(text) + 1) + [True] * len(text)
    limit = len(text) + 31 + 2
    found = token_panel.runs(example(ids, marks), tokenizer, [("v.nii.gz", 31)], limit)
    assert [run.kind for run in found] == ["context", "image", "supervised", "cut"]
    assert "".join(piece.text for piece in found[0].pieces) == "Normal chest."
    assert found[1].pieces[0].text == "image · 31 tokens"
    assert found[2].pieces[0].tip == f"id {text[0]} · place {len(text) + 31}"
    assert len(found[2].pieces) == 2 and len(found[3].pieces) == len(text) - 2


def test_an_image_that_runs_over_the_largest_bucket_says_so(tokenizer):
    found = token_panel.runs(example([5, IMAGE_ID, 6], [0, 0, 1]), tokenizer, [("v", 40)], 33)
    assert found[1].pieces[0].text == "image · 40 tokens, 8 cut off" and found[2].kind == "cut"


def test_tokens_that_spell_one_character_are_one_piece(tokenizer):
    ids = tokenizer.encode("sağ → 7", False)
    pieces = [piece for run in token_panel.runs(example(ids, [1] * len(ids)), tokenizer, [], 99) for piece in run.pieces]
    assert "".join(piece.text for piece in pieces) == "sağ → 7"
    assert len(pieces) < len(ids)


def volume(path, air, value=50, slope=1, intercept=0):
    voxels = np.full((30, 22, 14), value, np.int16)
    voxels[:9] = air
    image = nibabel.Nifti1Image(voxels, np.diag([3.0, 3.0, 4.0, 1]))
    image.header.set_slope_inter(slope, intercept)
    nibabel.save(image, path)


def metadata(folder, *rows):
    path = folder / "m.csv"
    lines = [f'{name},{slope},{intercept},"[3.0, 3.0]",4.0' for name, slope, intercept in rows]
    path.write_text("\n".join(["VolumeName,RescaleSlope,RescaleIntercept,XYSpacing,ZSpacing", *lines]))
    return path


def test_volume_panel_names_the_rule_and_counts_in_hounsfield_units(tmp_path):
    volume(tmp_path / "v.nii.gz", 24, value=1074)  # stored numbers, 24 is air
    panels, fault = volume_panel.panels(
        str(tmp_path / "v.nii.gz"), Metadata(str(metadata(tmp_path, ("v.nii.gz", 1, -1024)))), "auto", ENCODE
    )
    assert fault == "" and [panel.reading for panel in panels] == ["csv"]
    bars = {bar["from"]: bar["share"] for bar in panels[0].histogram["bars"] if bar["share"]}
    assert bars == {-1000: pytest.approx(0.3), 50: pytest.approx(0.7)}
    assert len(panels[0].views) == 3 and "30 × 22 × 14 voxels of 3 × 3 × 4 mm" in dict(panels[0].facts)["In the file"]


def test_a_volume_that_the_rule_refuses_is_shown_in_every_reading(tmp_path):
    volume(tmp_path / "v.nii.gz", -300)
    source = Metadata(str(metadata(tmp_path, ("v.nii.gz", 1, -8192))))
    panels, fault = volume_panel.panels(str(tmp_path / "v.nii.gz"), source, "auto", ENCODE)
    assert "no reading" in fault and [panel.reading for panel in panels] == ["header", "csv"]
    assert panels[0].histogram["clipped"] == 0 and panels[1].histogram["clipped"] == 1


@pytest.fixture
def data(tmp_path):
    """The golden records with some that go wrong, their token files, two volumes, and a config of small buckets."""
    records = json.loads((GOLDEN / "records.json").read_text())
    ask, say = {"from": "human", "value": "<image>\nReport?"}, {"from": "gpt", "value": "Normal."}
    image = "valid_21_a_2.nii.gz"
    records += [
        {"id": "ends", "image": image, "conversations": [ask, {"from": "gpt", "value": "Yes.<|eot_id|>No."}]},
        {"id": "long", "image": image, "conversations": [ask, {"from": "gpt", "value": "No hernia. " * 60}]},
        {"id": "lost", "image": "valid_0_a_0.nii.gz", "conversations": [ask, say]},
        {"id": "odd", "image": image, "conversations": [say, say]},
    ]
    (tmp_path / "records.json").write_text(json.dumps(records))
    (tmp_path / "config.py").write_text(CONFIG)
    shutil.copytree(GOLDEN / "embeddings", tmp_path / "embeddings")
    (tmp_path / "volumes").mkdir()
    volume(tmp_path / "volumes" / image, -1000)
    return tmp_path


def run(data, *flags):
    common = ["--model.tokenizer", str(GOLDEN / "base"), "--data.records", str(data / "records.json")]
    return command.run([str(data / "config.py"), *common, "--out", str(data / "page.html"), *flags])


def test_command_counts_and_names_what_training_would_not_take(data, capsys):
    count = len(json.loads((data / "records.json").read_text()))
    assert run(data, "--data.embeddings", str(data / "embeddings"), "--rows", f"0,{count - 4}-{count - 2}") == 0
    printed, html = capsys.readouterr().out, (data / "page.html").read_text()
    assert f"{count - 4} of {count} records can be trained on" in printed
    for name, reason in [("ends", "<|eot_id|>"), ("long", "largest bucket is 256"), ("lost", "no such file"), ("odd", "human")]:
        assert any(f"'{name}'" in line and reason in line for line in printed.splitlines()), name
    assert html.count("<article") == 4 and "<img" not in html
    assert "Voided." in html and "Cannot be used." in html and "image · 30 tokens" in html and 'class="tok cut"' in html


def test_command_shows_slices_with_volumes_and_needs_no_token_files(data):
    assert run(data, "--volumes", str(data / "volumes"), "--rows", "0,1") == 0
    html = (data / "page.html").read_text()
    assert html.count("data:image/png") == 3 and "scaling alone gives air" in html
    assert "valid_34_b_1.nii.gz is not in" in html
    assert "Without --data.embeddings" in html and "at most" in html


def test_check_values_reads_every_file(data, capsys):
    path = data / "records.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:3]))
    flags = ["--data.embeddings", str(data / "embeddings"), "--check-values", "--random", "0"]
    assert run(data, *flags) == 0
    assert "values of all files are sound" in capsys.readouterr().out
    broken = np.ones((18, 3, 5, 2), np.float32)
    broken[3, 1, 2, 1] = np.nan
    write_npz(str(data / "embeddings" / "valid_34_b_1.nii_embedded.npz"), broken, "")
    assert run(data, *flags) == 1
    assert "NaN" in capsys.readouterr().out and "valid_34_b_1" in (data / "page.html").read_text()


def test_rows_are_chosen_by_index_or_by_lot(data):
    assert command.parse_rows("3, 0,5-7,6") == (3, 0, 5, 6, 7)
    for text in ("a", "1-", "-2", "1.5"):
        with pytest.raises(UserError, match="--rows"):
            command.parse_rows(text)
    with pytest.raises(UserError, match="record 99 does not exist"):
        run(data, "--rows", "99")
    count = len(json.loads((data / "records.json").read_text()))
    with pytest.raises(UserError, match="cannot be read as a record"):
        run(data, "--rows", str(count - 1))
    shown = []
    for seed in ("1", "1", "2"):
        run(data, "--random", "2", "--seed", seed)
        shown.append([line for line in (data / "page.html").read_text().splitlines() if "<h3>Record" in line])
    assert len(shown[0]) == 2 and shown[0] == shown[1] != shown[2]


def test_what_is_missing_is_said(data):
    with pytest.raises(UserError, match="needs a tokenizer"):
        command.run([str(data / "config.py"), "--data.records", str(data / "records.json")])
    with pytest.raises(UserError, match="needs records"):
        command.run([str(data / "config.py")])


def test_a_whole_model_and_a_mixture_are_shown_as_training_takes_them(tmp_path, capsys):
    vit3d = Path(__file__).parents[1] / "golden" / "vit3d"
    records = str(vit3d / "data" / "M3D_Cap_npy" / "M3D_Cap.json")
    sets = [
        {"name": name, "records": f"{records}:{name}", "volumes": str(vit3d / "data"), "weight": weight}
        for name, weight in (("train", 1), ("test100", 3))
    ]
    (tmp_path / "mix.json").write_text(json.dumps({"sets": sets, "epoch": "train"}))
    flags = ["--data.records", str(tmp_path / "mix.json"), "--data.max-length", "384", "--metadata", "unused.csv"]
    flags += ["--model.base", str(vit3d / "lamed_merged"), "--set", "vision.heads=3", "--visual.prepare.augment", "none"]
    flags += ["--data.buckets", "384", "--out", str(tmp_path / "page.html")]
    assert command.run(["vit3d_m3d", *flags]) == 0
    shown = capsys.readouterr()
    assert "5 of 5 records can be trained on" in shown.out and "visual.volume (8, 24, 21)" in shown.err
    assert "an epoch has 12 samples: train 3, test100 9 (of 2, each 4.5 times)" in shown.out
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png") == 5 * 4 and "Without --data.volumes" not in page
    sets[1]["volumes"] = str(tmp_path)
    (tmp_path / "mix.json").write_text(json.dumps({"sets": sets}))
    assert command.run(["vit3d_m3d", *flags]) == 0
    assert "3 of 5 records can be trained on" in capsys.readouterr().out


def test_lengths_are_those_that_training_plans_with(tmp_path):
    vit3d = Path(__file__).parents[1] / "golden" / "vit3d"
    shutil.copytree(vit3d / "data" / "M3D_Cap_npy", tmp_path / "M3D_Cap_npy")  # lengths are kept beside the records
    (tmp_path / "prompts.txt").write_text("Report?\nA much longer request, of which training may draw every word?\n")
    records, asked = f"{tmp_path}/M3D_Cap_npy/M3D_Cap.json:train", common.load_experiment("vit3d_m3d")
    places = {"records": records, "volumes": str(tmp_path), "prompts": str(tmp_path / "prompts.txt")}
    data = dataclasses.replace(asked.data, **places, buckets=(384,), max_length=384)
    model = dataclasses.replace(asked.model, base=str(vit3d / "lamed_merged"))
    visual = dataclasses.replace(asked.visual, prepare=PrepareConfig())
    asked = resolve(dataclasses.replace(asked, model=model, data=data, visual=visual), ())[0]
    tokenizer = Tokenizer.from_folder(model.base, asked.model.added_tokens)
    rows, dataset = survey(asked, tokenizer, records).rows, scan(asked, tokenizer, records)
    assert [(row.length, row.supervised) for row in rows] == [(s.length, s.supervised) for s in dataset.sizes]
    assert len(rows) == 3
