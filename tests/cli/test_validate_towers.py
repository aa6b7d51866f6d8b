"""Training on from folders with an image tower: what they decide, what flags may say, what a data set then is."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from jaxmed._configs import vit3d_align, vit3d_amos
from jaxmed.checkpoint.values import Values
from jaxmed.cli.validate import given_flags, resolve
from jaxmed.config import DataConfig, Experiment, LoraConfig, ModelConfig, PrepareConfig, TowerConfig, VisualConfig
from jaxmed.data.dataset import scan
from jaxmed.data.rows import build_rows
from jaxmed.data.tokenizer import Tokenizer
from jaxmed.errors import UserError
from jaxmed.models.presets import TINY

GOLDEN = Path(__file__).parents[1] / "golden" / "mistral_llava"
BASE, TOWER, LORA = (str(GOLDEN / name) for name in ("llava_mistral_base", "clip_small46", "llava_lora_mistral_tubes"))


def start(tmp_path, model=None, **data):
    records = json.loads((GOLDEN / "train_records.json").read_text())
    (tmp_path / "r.json").write_text(json.dumps(records))
    model = {"base": BASE, "tower_folder": TOWER} | (model or {})
    settings = {"records": str(tmp_path / "r.json"), "images": str(GOLDEN / "images"), "buckets": (256,), "supervised": 99}
    return Experiment(
        ModelConfig(TINY, **model),
        visual=VisualConfig(images=2),
        lora=LoraConfig(rank=4, alpha=9.0),
        data=DataConfig(**settings | data),
    )


def test_a_whole_model_as_the_base(tmp_path):
    found, notices = resolve(start(tmp_path), given_flags([]))
    tower, pixels = found.model.tower, found.visual.pixels
    assert (tower.kind, tower.width, tower.heads, tower.layers) == ("clip", 35, 5, 5)
    assert (found.visual.kind, found.visual.tokens, found.visual.grid, found.visual.images) == ("pixels", 36, (1, 6, 6), 2)
    assert (pixels.shortest, pixels.crop, pixels.aspect) == (50, 46, "pad") and pixels.mean == (0.5012, 0.4473, 0.3921)
    assert found.model.projector.kind == "mlp2x_gelu" and found.model.decoder.vocab == 461
    assert (found.data.template, found.lora.rank, found.data.buckets) == ("mistral_instruct", 4, (256,))
    assert any(line.startswith("tower: ") for line in notices) and any("data.template mistral_instruct" in n for n in notices)
    tokenizer = Tokenizer.from_folder(found.model.base)
    data = dataclasses.replace(found.data, on_bad_record="skip")
    dataset = scan(dataclasses.replace(found, data=data), tokenizer, found.data.records)
    batch = dataset.plan()[0]
    arrays, problems = build_rows(dataset, batch, range(len(batch.rows)))
    assert not problems and arrays["images"].shape[1:] == (2, 46, 46, 3) and np.abs(arrays["images"]).max() > 0.5
    assert arrays["image_token_mask"].sum() == 36 * sum(dataset.samples[i].size.images for i in batch.samples) > 0


def test_an_upstream_adapter_over_it(tmp_path):
    found, _ = resolve(start(tmp_path, {"adapter": LORA}), given_flags([]))
    assert (found.lora.rank, found.lora.alpha, found.model.adapter, found.model.base) == (7, 17, LORA, BASE)
    assert found.visual.kind == "pixels" and found.data.template == "mistral_instruct"


def test_flags_that_may_differ_and_flags_that_may_not(tmp_path):
    asked = start(tmp_path, template="v1")
    asked = dataclasses.replace(asked, visual=VisualConfig(images=3))
    found, _ = resolve(asked, given_flags(["--data.template", "v1", "--visual.images=3"]))
    assert (found.data.template, found.visual.images, found.visual.kind) == ("v1", 3, "pixels")
    wide = start(tmp_path, {"tower": TowerConfig(kind="clip", width=64)})
    with pytest.raises(UserError, match=r"--model\.tower\.width 64 disagrees with .*llava_mistral_base, which has 35"):
        resolve(wide, given_flags(["--model.tower.width", "64"]))
    normed = dataclasses.replace(start(tmp_path), visual=VisualConfig(norm=True))
    with pytest.raises(UserError, match=r"--visual\.norm True disagrees"):
        resolve(normed, given_flags(["--visual.norm"]))


def test_axes_of_a_volume_in_another_order_are_refused(tmp_path):
    """A scan of 256 x 256 x 32 has as many patches as one of 32 x 256 x 256, and others would be neighbours."""
    (tmp_path / "cap.json").write_text("[]")
    config = vit3d_amos.get_config()
    model = dataclasses.replace(config.model, base=str(GOLDEN.parent / "vit3d/base"), tower_source="random")
    turned = dataclasses.replace(config.visual, volume=(256, 256, 32))
    data = dataclasses.replace(config.data, records=str(tmp_path / "cap.json"), volumes=str(tmp_path))
    asked = dataclasses.replace(config, model=model, visual=turned, data=data)
    with pytest.raises(UserError, match=r"visual\.grid is \(8, 16, 16\), a volume of .* has \(64, 16, 2\) patches"):
        resolve(asked, given_flags(["--visual.volume"]))


def test_folders_that_are_not_there(tmp_path):
    for flag, asked in {
        "--data.images": start(tmp_path, images="/no/where"),
        "--data.volumes": start(tmp_path, volumes="/no/where"),
    }.items():
        with pytest.raises(UserError, match=f"{flag} /no/where: no such folder"):
            resolve(asked, given_flags([]))


def test_settings_beside_a_projector_of_m3d(tmp_path):
    """Upstream's first stage writes mm_projector.bin and config.json; the kind of pooling shows in no tensor."""
    source = GOLDEN.parent / "vit3d"
    tensors = load_file(source / "lamed_merged" / "model.safetensors")
    kept = {name: x for name, x in tensors.items() if "mm_projector" in name or "embed_tokens" in name}
    kept |= {name.replace(".2.", ".1."): kept.pop(name) for name in list(kept) if ".projector.2." in name}
    torch.save({name: torch.tensor(x) for name, x in kept.items()}, tmp_path / "mm_projector.bin")
    config = json.loads((source / "lamed_merged" / "config.json").read_text())
    config |= {"proj_layer_type": "linear", "proj_pooling_type": "sequence", "proj_pooling_size": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked = vit3d_align.get_config()
    places = {"base": str(source / "base"), "tower_folder": str(source / "lamed_merged"), "adapter": str(tmp_path)}
    model = dataclasses.replace(asked.model, **places, tower=dataclasses.replace(asked.model.tower, heads=3))
    data = dataclasses.replace(asked.data, records=str(source / "data/M3D_Cap_npy/M3D_Cap.json"), volumes=str(source / "data"))
    visual = dataclasses.replace(asked.visual, prepare=PrepareConfig())
    asked = dataclasses.replace(asked, model=model, visual=visual, data=data)
    found, notices = resolve(asked, given_flags(["--model.tower.heads=3"]))
    projector = found.model.projector
    assert (projector.spp_head, projector.spp_depth, projector.spp_pooling, projector.spp_size) == ("linear", 2, "sequence", 3)
    assert found.image_tokens == 6 and any("spp_pooling sequence" in line for line in notices)
    Values(found)
