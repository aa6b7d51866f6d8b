"""A run that was trained on a tower's tokens answers from volumes as from tokens, with that tower and that preparation."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxmed
from jaxmed import api
from jaxmed.checkpoint.manager import Checkpoints
from jaxmed.checkpoint.sources import weights_identity
from jaxmed.cli.main import run as command
from jaxmed.config import LoraConfig, MeshConfig, to_json
from jaxmed.data.tokenizer import Tokenizer
from jaxmed.errors import UserError
from jaxmed.generate import encode_tower
from jaxmed.generate.tower import Tower
from jaxmed.sharding import make_mesh, replicated
from jaxmed.train.init import blueprint, flatten, unflatten
from jaxmed.types import TrainState

VIT3D = Path(__file__).parents[1] / "golden" / "vit3d"
LAMED = str(VIT3D / "lamed_merged")
NAMES = ("ct_case/013305/Axial_non-contrast.npy", "ct_case/004217/Axial_lung_window.npy")
VOLUMES = VIT3D / "data" / "M3D_Cap_npy"
ADDED = ("<im_patch>", "<bx_start>", "<bx_end>", "[SEG]")
QUESTION = "What does the scan show?"


pytestmark = pytest.mark.usefixtures("compiled_quickly", "on_one_device")


def made_run(folder: Path, experiment, encoder: str) -> str:
    """A run without its training: what it would train is drawn anew, the rest is the base."""
    folder.mkdir()
    (folder / "config.json").write_text(to_json(experiment))
    Tokenizer.from_folder(experiment.model.tokenizer, experiment.model.added_tokens).save(str(folder / "tokenizer"))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        leaves = flatten(blueprint(experiment, mesh).trainable)
    rng = np.random.default_rng(7)
    values = {p: jax.device_put(rng.standard_normal(x.shape, np.float32) * 0.3, x.sharding) for p, x in leaves.items()}
    assert {path[0] for path in values} >= {"projector"}
    trainable = unflatten(values)
    checkpoints = Checkpoints(str(folder), 1)
    meta = {"step": 3, "encoder": encoder, "base_fingerprint": weights_identity(experiment.model)}
    checkpoints.save(
        TrainState(jax.device_put(np.int32(3), replicated(mesh)), trainable, {"none": values[next(iter(values))]}), meta
    )
    checkpoints.close()
    return str(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[str, str]:
    """A run on tokens that were prepared otherwise than its config says, and the folder of the tokens."""
    at = tmp_path_factory.mktemp("run")
    given = api.resolve(LAMED, "", "float32", {"vision.heads": 3})
    prepare = replace(given.visual.prepare, preset="hu_window", window=(-160.0, 240.0))
    tower = Tower(replace(given, visual=replace(given.visual, prepare=prepare)), "float32", devices=jax.devices()[:1])
    encode_tower.encode_folder(str(VOLUMES), str(at / "tokens"), tower)
    base = str(VIT3D / "base")  # no tower, and four tokens fewer
    decoder = replace(given.model.decoder, vocab=175)
    model = replace(given.model, base=base, tokenizer=base, tower_folder="", decoder=decoder, added_tokens=ADDED)
    train = replace(given.train, train_tower=False, trainable="projector")
    on_tokens = replace(
        given, model=model, visual=replace(given.visual, kind="embeddings"), train=train, lora=LoraConfig(rank=0)
    )
    return made_run(at / "run", on_tokens, encode_tower.signature(tower)), str(at / "tokens")


def test_from_python(made) -> None:
    run, tokens = made
    asked = [QUESTION, "Where?"]
    from_tokens = jaxmed.load(run, dtype="float32")
    from_volumes = jaxmed.load(run, tower=LAMED, dtype="float32")
    assert (from_tokens.experiment.has_tower, from_volumes.experiment.has_tower) == (False, True)
    assert from_volumes.experiment.visual.prepare.window == (-160.0, 240.0)
    files = [f"{tokens}/{name.removesuffix('.npy')}.nii_embedded.npz" for name in NAMES]
    of_tokens = from_tokens.logits(files, asked)
    of_volumes = from_volumes.logits([str(VOLUMES / name) for name in NAMES], asked)
    for ours, theirs in zip(of_volumes, of_tokens, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


def test_the_command_reads_what_it_is_given(made, tmp_path, capsys) -> None:
    run, tokens = made
    turns = [{"from": "human", "value": f"<image>{QUESTION}"}]
    (tmp_path / "r.json").write_text(json.dumps([{"id": n, "image": n, "conversations": turns} for n in NAMES]))
    flags = ["--records", str(tmp_path / "r.json"), "--max-new-tokens", "7", "--token-ids", "--dtype", "float32"]

    def answers(*more: str) -> list[list[int]]:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}_vqa.json"
        assert command(["generate", run, *flags, *more, "--out", str(out)]) == 0
        return [answer["token_ids"] for study in json.loads(out.read_text()) for answer in study["conversations_out"]]

    of_tokens = answers("--embeddings", tokens)
    assert len({tuple(ids) for ids in of_tokens}) == 2
    assert answers("--volumes", str(VOLUMES), "--tower", LAMED) == of_tokens
    assert answers("--embeddings", tokens, "--tower", LAMED) == of_tokens
    assert "is not used" in capsys.readouterr().err
    out = ["--out", str(tmp_path / "none_vqa.json")]
    assert command(["generate", run, *flags, *out, "--volumes", str(VOLUMES)]) == 2
    assert "give that tower's folder with --tower" in capsys.readouterr().err


def test_another_tower_or_preparation_is_refused(made) -> None:
    run, _ = made
    with pytest.raises(UserError, match=r"was trained on tokens of vit3d-\w+, this tower is vit3d-\w+"):
        jaxmed.load(run, tower=LAMED, overrides={"model.tower.heads": 4})
    with pytest.raises(UserError, match="prepared by 'hu_window@2 8x24x21 window=-160,240', these would be by 'm3d@2 8x24x21'"):
        jaxmed.load(run, tower=LAMED, overrides={"visual.prepare.preset": "m3d"})
