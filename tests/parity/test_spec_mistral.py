"""LLaVA-Med's parts with their negative controls: which CLIP layer is taken and with which GELU, Mistral's window, pixels of
padding, three spellings of one model, and ids, labels and voided rows in Mistral's own vocabulary.

Axis letters: B batch, T text, C features, D decoder width.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from torch_pair import RULES, Row, batch_of, decoder_params, one_device, run_model, text_experiment, torch_llama
from tower_pair import at_root, channels_last, filled, randomise, state_of
from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaConfig, LlavaForConditionalGeneration, MistralConfig

from jaxmed.checkpoint.hf_io import TensorFolder
from jaxmed.checkpoint.hf_tables import experiment_rows
from jaxmed.checkpoint.load import read_params
from jaxmed.checkpoint.names import canonical_names, ignored_reason
from jaxmed.checkpoint.tower_tables import TOWER_PREFIX, surplus_reason, tower_rows
from jaxmed.config import (
    DataConfig,
    Experiment,
    LoraConfig,
    ModelConfig,
    PixelConfig,
    ProjectorConfig,
    TrainConfig,
    VisualConfig,
)
from jaxmed.data.conversation import TEMPLATES, encode_prompt, encode_training, render
from jaxmed.data.images import load_pixels
from jaxmed.data.records import Record, Turn
from jaxmed.data.tokenizer import IGNORE, IMAGE_ID, Tokenizer
from jaxmed.generate.prompts import put
from jaxmed.models.presets import MISTRAL_7B
from jaxmed.models.presets_towers import CLIP_L14_336
from jaxmed.models.vit import Vit
from jaxmed.models.vlm import Vlm
from jaxmed.train.init import flatten
from jaxmed.train.loss import token_losses

pytestmark = pytest.mark.usefixtures("compiled_quickly")
TOWER = dataclasses.replace(CLIP_L14_336, image=(45, 45), width=24, layers=4, heads=3, mlp=40, norm_eps=3e-3)
"""Three pixels are left over on each side."""
DECODER = dataclasses.replace(
    MISTRAL_7B, vocab=131, width=48, layers=3, heads=6, kv_heads=2, head_dim=8, mlp=76, norm_eps=1e-2, initializer_range=0.3
)
DECODER = dataclasses.replace(DECODER, rope=dataclasses.replace(DECODER.rope, theta=37.0))


# -- CLIP ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [-2, -3])
def test_clip_gives_the_selected_layer_without_its_class_token(layer):
    """Neighbouring layers, the last norm and the exact GELU are all something else."""
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 3}
    hf = CLIPVisionConfig(**sizes, image_size=45, patch_size=14, layer_norm_eps=3e-3, attn_implementation="eager")
    model = randomise(CLIPVisionModel(hf), seed=2)
    x = np.random.default_rng(0).normal(size=(2, 3, 45, 45)).astype(np.float32)
    with torch.no_grad():
        out = model(torch.from_numpy(x), output_hidden_states=True)
        others = {near: out.hidden_states[near][:, 1:] for near in (layer - 1, layer + 1)}
        others["norm"] = model.post_layernorm(out.hidden_states[layer])[:, 1:]
        for block in model.encoder.layers:
            block.mlp.activation_fn = torch.nn.GELU()
        others["exact GELU"] = model(torch.from_numpy(x), output_hidden_states=True).hidden_states[layer][:, 1:]
    config = dataclasses.replace(TOWER, select_layer=layer)
    tensors = state_of(model, f"{TOWER_PREFIX}vision_model.")
    with jax.set_mesh(one_device()):
        graphdef, params = filled(lambda: Vit(config, jax.random.key(0)), at_root(tower_rows(config)), tensors)
        found = np.asarray(jax.jit(lambda p, x: nnx.merge(graphdef, p)(x, RULES))(params, channels_last(x)))
    assert found.shape == (2, 9, 24)
    np.testing.assert_allclose(found, out.hidden_states[layer][:, 1:], atol=2e-5)
    for name, other in others.items():
        assert np.abs(found - other.numpy()).max() > 1e-3, name


@pytest.mark.parametrize(("grey", "wanted"), [(False, (-0.0113, -0.0112, -0.0013)), (True, (-0.1280,))])
def test_colour_of_padding(grey, wanted):
    """The mean colour, or, for greyscale files as LLaVA-Med's evaluation has them, the mean of the means in all channels."""
    image = np.full((30, 60), 200, np.uint8)
    found = load_pixels(image, PixelConfig("pad", 336, 336, pad_grey=grey))[0, 0]
    if grey:
        pixel = np.asarray(PixelConfig().mean) + np.asarray(PixelConfig().sd) * found
        np.testing.assert_allclose(pixel * 255, 114, atol=1e-3)
    np.testing.assert_allclose(found[: len(wanted)], wanted, atol=1e-4)


# -- Mistral ---------------------------------------------------------------------------------------------------------------


def rows() -> list[Row]:
    rng = np.random.default_rng(4)
    return [Row(rng.integers(0, 131, n).tolist(), [-100] * n) for n in (17, 11)]


@pytest.mark.parametrize("window", [5, 17])
def test_window_and_padding(window):
    """A window as long as the longest row is none; padding on either side changes nothing."""
    decoder = dataclasses.replace(DECODER, window=window)
    model = torch_llama(decoder)
    experiment, params = text_experiment(decoder), {"decoder": decoder_params(model, decoder)}
    sides = [jax.device_get(batch_of(rows(), 19, left=left)) for left in (False, True)]
    batch = put(jax.tree.map(lambda *x: np.concatenate(x), *sides), one_device(), RULES)
    _, found, _, _ = run_model(experiment, params, batch, None)
    for n, row in enumerate(rows()):
        wanted, count = model(torch.tensor([row.ids])).logits[0].detach(), len(row.ids)
        np.testing.assert_allclose(found[n, :count, :131], wanted, atol=1e-4)
        np.testing.assert_allclose(found[2 + n, -count:, :131], wanted, atol=1e-4)
    if window == 17:
        _, without, _, _ = run_model(text_experiment(DECODER), params, batch, None)
        np.testing.assert_allclose(without, found, atol=1e-5)


# -- the whole -------------------------------------------------------------------------------------------------------------


def experiment(dtype: str = "float32", layers: int = 2) -> Experiment:
    decoder = dataclasses.replace(DECODER, layers=layers)
    model = ModelConfig(decoder, tower=TOWER, projector=ProjectorConfig("mlp2x_gelu"), dtype=dtype)
    visual = VisualConfig("pixels", tokens=9, features=24, grid=(1, 3, 3))
    train = TrainConfig(trainable="all", remat="none", attention_chunk=8, loss_chunk=3)
    return Experiment(model, visual, LoraConfig(rank=0), train=train, data=DataConfig(batch=2))


@functools.cache
def llava() -> dict[str, np.ndarray]:
    """Tensors of transformers' Llava, as its version 5 names them in memory and files."""
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 3}
    text = {"hidden_size": 48, "intermediate_size": 76, "num_hidden_layers": 2, "num_attention_heads": 6}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=45, patch_size=14),
        text_config=MistralConfig(**text, num_key_value_heads=2, head_dim=8, vocab_size=131),
        image_token_index=5,
    )
    return state_of(randomise(LlavaForConditionalGeneration(config), seed=3, spread=0.2), "")


SPELLINGS = {
    "transformers 5": {},
    "transformers 4": {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.vision_tower.": "vision_tower.vision_model.",
    },
    "LLaVA-Med": {
        "model.language_model.": "model.",
        "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
        "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    },
}


def spelled(names: dict[str, str]) -> dict[str, np.ndarray]:
    found = {}
    for name, array in llava().items():
        stem = next((old for old in names if name.startswith(old)), "")
        found[names.get(stem, "") + name.removeprefix(stem)] = array
    return found


def loaded(tensors: dict[str, np.ndarray]) -> dict:
    """Strictly, by canonical names."""
    tensors = {ours: tensors[theirs] for ours, theirs in canonical_names(tensors, "memory").items()}
    table = experiment_rows(experiment())
    left = tensors.keys() - {name for row in table for name in row.names()}
    assert all(surplus_reason(name, TOWER) or ignored_reason(name) for name in left), left
    with jax.set_mesh(one_device()):
        built = jax.eval_shape(lambda: Vlm(experiment(), jax.random.key(0), split=False))
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), nnx.to_pure_dict(nnx.state(built)))
        kept = {name: x for name, x in tensors.items() if name not in left}
        return read_params(table, [TensorFolder("memory", kept, dict.fromkeys(kept, "file"))], shapes)


def test_three_spellings_are_one_model_to_the_bit():
    models = {name: flatten(loaded(spelled(names))) for name, names in SPELLINGS.items()}
    first = models["transformers 5"]
    assert len({frozenset(spelled(names)) for names in SPELLINGS.values()}) == 3
    for name, model in models.items():
        assert model.keys() == first.keys()
        for path, x in first.items():
            np.testing.assert_array_equal(model[path], x, err_msg=f"{name} {path}")
    with pytest.raises(AssertionError, match="surprise"):
        loaded(llava() | {"model.surprise.weight": np.zeros(2, np.float32)})


def test_the_image_is_seen_and_bfloat16_is_near_float32():
    """Upstream's own training was blind to its images: with other pixels, the loss must be another."""
    row = Row([5, -200, 7, 31, 2, 9], [-100, -100, -100, 31, 2, 9], (np.zeros((9, 1), np.float32),))
    text = Row([5, 8, 7, 31], [-100, -100, -100, 31])
    made = jax.device_get(batch_of([row, text], 17, 1, 1, 9))
    pixels = np.random.default_rng(1).normal(size=(3, 2, 1, 45, 45, 3)).astype(np.float32)
    params, losses = loaded(spelled(SPELLINGS["LLaVA-Med"])), {}
    with jax.set_mesh(one_device()):
        for dtype in ("float32", "bfloat16"):
            graphdef, _ = nnx.split(jax.eval_shape(lambda d=dtype: Vlm(experiment(d), jax.random.key(0), split=False)))
            run = jax.jit(lambda p, b, g=graphdef: token_losses(nnx.merge(g, p), b, RULES, None, 3)[0])
            for n, values in enumerate(pixels):
                batch = put(dataclasses.replace(made, images=values), one_device(), RULES)
                losses[dtype, n] = np.asarray(run(params, batch))
    exact = [losses["float32", n] for n in range(3)]
    for a, b in itertools.combinations(exact, 2):
        assert abs(a[0] - b[0]) > 1e-3 and a[1] == b[1], "the row of text alone does not see the image beside it"
    for n in range(3):
        np.testing.assert_allclose(losses["bfloat16", n], exact[n], rtol=2e-2)


# -- text ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mistral(tmp_path_factory) -> Tokenizer:
    """Mistral's own vocabulary of 32,000 pieces."""
    spec = importlib.util.find_spec("mistral_common")
    if spec is None:
        pytest.skip("mistral-common, which ships Mistral's vocabulary, is not installed")
    folder = tmp_path_factory.mktemp("mistral")
    shutil.copy(Path(spec.submodule_search_locations[0]) / "data" / "tokenizer.model.v1", folder / "tokenizer.model")
    return Tokenizer.from_folder(str(folder))


def record(*texts: str) -> Record:
    return Record("r", ("a.png",), tuple(Turn(("human", "gpt")[i % 2], text) for i, text in enumerate(texts)))


USER, LINES = "Image:<image>\n", [9833, 28747, IMAGE_ID, 28705, 13]


def test_prompts_in_mistrals_vocabulary(mistral):
    """Five ids stand before a leading image."""
    ids = encode_prompt([("human", "<image>\nWhat is shown?"), ("gpt", None)], mistral, "mistral_instruct").tolist()
    begin, end = [1, 733, 16289, 28793], [733, 28748, 16289, 28793]
    assert ids == [*begin, 28705, IMAGE_ID, 28705, 13, 3195, 349, 4894, 28804, *end]
    assert ids.index(IMAGE_ID) == 5 and mistral.encode("___", special=False) == [13192]
    # the curriculum's first stage: the text is pinned by its hash, the ids by themselves
    told = [2820, 16981, 2236, 2670, 567, 4537, 28814, 2482, 28723]
    text = USER + mistral.decode(told).strip()
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "fb604658cd923dc5", text
    raw = render(TEMPLATES["mistral_instruct"], [("human", text), ("gpt", None)])
    assert raw.endswith("[/INST]")
    found = encode_prompt([("human", text), ("gpt", None)], mistral, "mistral_instruct").tolist()
    assert found == [*begin, *LINES, *told, *end]
    # the second stage has the patient's data before the same
    told = [2820, 16981, 2236, 2670, 28725, 4537, 28814, 2482, 567, 315, 5072, 28723]
    text = 'Patient Data:\n{"Age": 61}\n\n' + USER + mistral.decode(told).strip()
    found = encode_prompt([("human", text), ("gpt", None)], mistral, "mistral_instruct").tolist()
    assert found[-len(told) - 9 :] == [4176, *LINES[1:], *told, *end]


ANSWERS = ["No.", "\nNo.", "3 nodules", "___ is seen", "é µm", "A\nB", "[/INST].", " x", "No. </ s>"]


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_supervised_text_is_every_answer_a_blank_and_the_end(mistral, rounds):
    for start in range(len(ANSWERS)):
        answers = [ANSWERS[(start + i) % len(ANSWERS)] for i in range(rounds)]
        texts = [text for n, answer in enumerate(answers) for text in (f"{'<image>' * (n == 0)}\nQ{n}?", answer)]
        example = encode_training(record(*texts), mistral, "mistral_instruct")
        assert example.voided == ""
        supervised = example.labels != IGNORE
        np.testing.assert_array_equal(example.labels[supervised], example.ids[supervised])
        runs = np.split(example.ids[supervised], np.flatnonzero(example.ids[supervised] == 2)[:-1] + 1)
        assert [run[-2:].tolist() for run in runs] == [[28705, 2]] * rounds
        # the blank before an answer belongs to its first piece
        assert [mistral.decode(run).lstrip(" ") for run in runs] == [f"{answer} </s>".lstrip(" ") for answer in answers]
    short = encode_training(record("<image>\nQ", "No."), mistral, "mistral_instruct")
    assert short.labels[short.labels != IGNORE].tolist() == [1770, 28723, 28705, 2]


@pytest.mark.parametrize("bad", ["", "a </s> b", "x [/INST] y", "ends in [/INST]"])
def test_one_round_that_cannot_be_aligned_voids_its_row(mistral, bad):
    for texts in (("<image>\nQ", bad), ("<image>\nQ", "No.", "Q", bad), ("<image>\nQ", bad, "Q", "No.")):
        example = encode_training(record(*texts), mistral, "mistral_instruct")
        if bad or texts[-1] == bad:
            assert example.voided and (example.labels == IGNORE).all(), texts
        else:  # upstream writes nothing for an answer that is not there, and both questions become one
            assert example.labels[example.labels != IGNORE].tolist() == [1770, 28723, 28705, 2]


def test_padding_that_is_the_end_token(mistral, tmp_path):
    """The end of an answer is supervised all the same; nothing behind it is."""
    mistral.save(str(tmp_path))
    padded = Tokenizer.from_folder(str(tmp_path), pad_token="</s>")
    assert (padded.pad_id, padded.eos_ids) == (2, (2,))
    for answers in (["No."], ["No.", "Yes."]):
        texts = [text for answer in answers for text in ("<image>\nQ" if answer == "No." else "Q", answer)]
        ours, plain = (encode_training(record(*texts), t, "mistral_instruct") for t in (padded, mistral))
        assert ours.labels.tolist() == plain.labels.tolist() and ours.ids.tolist() == plain.ids.tolist()
        assert (ours.labels == 2).sum() == len(answers) and ours.labels[-1] == 2
