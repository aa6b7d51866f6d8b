"""Upstream's own numbers for LLaVA-Med on Mistral (tests/golden/mistral_llava) through jaxmed.load: tower, projector, sliding
window, adapter, merge, logits, greedy ids, training batches, the same on meshes of several devices."""

import jax
import numpy as np
import pytest
from golden_case import Case, norm, norms
from safetensors.numpy import load_file

import jaxmed
from jaxmed.cli import convert
from jaxmed.config import MeshConfig
from jaxmed.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("compiled_quickly")
CASE = Case("mistral_llava")
PROMPTS = CASE.about["prompts"]
RUNS = ("full", "short", "lora")
ADAPTER, BASE, TOWER = "llava_lora_mistral_tubes", "llava_mistral_base", "clip_small46"
FOLDERS = {"full": {"folder": BASE}, "short": {"folder": "llava_mistral_short"}, "lora": {"folder": ADAPTER, "base": BASE}}


@pytest.fixture(scope="module")
def models():
    """As upstream's evaluation pads grey images (True) and as its training does, each loaded once."""
    known = {}

    def of(run: str, pad_grey: bool = True):
        if (run, pad_grey) not in known:
            known[run, pad_grey] = CASE.load(**FOLDERS[run], tower=TOWER, overrides={"pad_grey": pad_grey})
        return known[run, pad_grey]

    return of


@pytest.mark.parametrize("run", RUNS)
def test_greedy_answers(models, run):
    """The short model's window is shorter than its prompts."""
    answers = CASE.answers(f"generate_{run}", models(run))
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}


@pytest.mark.parametrize("run", RUNS)
def test_logits_of_every_prompt(models, run):
    found = models(run).logits(*CASE.asked(PROMPTS))
    CASE.close(f"logits_last_{run}", np.stack([x[-1] for x in found]))
    if run != "lora":
        CASE.close(f"logits_prefill_11_{run}", found[0])


@pytest.mark.parametrize(
    ("name", "run"), [("wide_37x88", "full"), ("tall_79x41", "full"), ("grey_52x67", "full"), ("tall_79x41", "short")]
)
def test_tower_and_projector(models, name, run):
    """Which block is read differs: the one before the last, or the one before that."""
    path, model = CASE.path("images", f"{name}.png"), models(run)
    (features,), (blocks,) = model.image_features([path], hidden=True)
    CASE.close(f"image_features_{name}_{run}", features)
    assert len(blocks) == 5 + model.experiment.model.tower.select_layer + 1
    np.testing.assert_array_equal(features, blocks[-1][1:])
    CASE.close(f"image_tokens_{name}_{run}", model.image_tokens([path])[0])


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """The adapter merged by `jaxmed convert`, in LLaVA's own layout."""
    out = tmp_path_factory.mktemp("merged") / "llava"
    folders = ["--base", CASE.path(BASE), "--tower", CASE.path(TOWER)]
    argv = [CASE.path(ADAPTER), "--to", "llava", "--merge", "--dtype", "float32", "--out", str(out), *folders]
    assert convert.run(argv) == 0
    return out


def test_merged_weights(merged):
    CASE.close("merged_weights", load_file(merged / "model.safetensors"))


def test_greedy_answers_of_the_merged_folder(merged):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model = jaxmed.load(merged, tower=CASE.path(TOWER), mesh=mesh, dtype="float32", overrides={"pad_grey": True})
    CASE.answers("generate_merged", model)


# -- training --------------------------------------------------------------------------------------------------------------


def training_rows() -> list[dict]:
    """Records of several rounds, one of them without an image."""
    records = {record["id"]: record for record in CASE.json("train_records.json")}
    return [records[name] for name in CASE.about["runs"]["train_full"]["record_ids"]]


@pytest.fixture(scope="module")
def losses(models):
    known = {}

    def of(run: str):
        if run not in known:
            known[run] = models(run, False).loss(training_rows(), gradients=True, folder=CASE.path("images"))
        return known[run]

    return of


@pytest.mark.parametrize("run", RUNS)
def test_loss_and_gradients(losses, run):
    found = losses(run)
    assert found.token_count == CASE.golden(f"train_loss_{run}")["supervised_tokens"]
    CASE.values(f"train_loss_{run}", loss=found.loss)
    sizes = norms(found.gradients)
    CASE.values(f"train_grad_norms_{run}", grad_norms=sizes, total_grad_norm=norm(found.gradients))


def test_loss_of_rows_cut_after_the_images_are_in():
    limit = CASE.about["runs"]["train_truncated"]["tokenizer_model_max_length"]
    model = CASE.load(BASE, tower=TOWER, overrides={"tokenizer_model_max_length": limit})
    found = model.loss(training_rows(), folder=CASE.path("images"))
    CASE.values("train_truncated", loss=found.loss)
    assert found.token_count == CASE.golden("train_truncated")["supervised_tokens"]


@pytest.mark.parametrize(("run", "shape"), [("lora", (2, 1, 2, 1)), ("short", (1, 2, 2, 1))], ids=str)
def test_loss_and_gradients_on_a_mesh(losses, run, shape):
    """`short` has a window; the tower's width of 35 does not divide over fsdp, so its weights are replicated."""
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
    folders = {name: CASE.path(folder) for name, folder in FOLDERS[run].items()}
    model = jaxmed.load(**folders, tower=CASE.path(TOWER), mesh=mesh, dtype="float32")
    found, wanted = model.loss(training_rows(), gradients=True, folder=CASE.path("images")), losses(run)
    assert found.loss == pytest.approx(wanted.loss, rel=1e-6)
    assert found.gradients.keys() == wanted.gradients.keys()
    for name, gradient in wanted.gradients.items():
        np.testing.assert_allclose(found.gradients[name], gradient, atol=2e-5, rtol=1e-3, err_msg=name)
