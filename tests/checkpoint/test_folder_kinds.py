"""Every folder is known by its files, whatever it is called; what is unknown is refused with what is known."""

import shutil

import pytest
import torch
import transformers
from golden_folders import GOLDEN, copy_of, edit
from safetensors.torch import load_file, save_file

from jaxmed.checkpoint.folder_kinds import KINDS, detect, detect_base
from jaxmed.errors import UserError

FOLDERS = {
    "mistral_llava/llava_mistral_base": "llava",
    "mistral_llava/llava_mistral_short": "llava",
    "mistral_llava/llava_lora_mistral_tubes": "llava_lora",
    "mistral_llava/clip_small46": "tower",
    "tinyllava/tinyllava_mini": "llava",
    "tinyllava/siglip_mini": "tower",
    "vit3d/base": "hf",
    "vit3d/lamed_merged": "lamed",
    "vit3d/lamed_lora": "lamed",
    "vit3d/m3d_clip": "m3d_clip",
    "samf/samf_merged": "samf",
    "samf/samf_lora": "samf",
    "samf/ao2d_merged": "samf",
}


@pytest.mark.parametrize("name", FOLDERS)
def test_golden_folders(name, tmp_path):
    assert detect(str(GOLDEN / name)) == FOLDERS[name]
    renamed = tmp_path / "a_folder"
    renamed.symlink_to(GOLDEN / name)
    assert detect(str(renamed)) == FOLDERS[name]


def test_fields_and_tensors_decide(tmp_path):
    """An M3D model under its language model's type, one without config, SAMF without its field, TinyLLaVA's other name."""
    lamed = copy_of("vit3d/lamed_merged", tmp_path / "llava_mistral")
    edit(lamed / "config.json", model_type="llama")
    assert detect(str(lamed)) == "lamed"
    for name in ("vit3d/lamed_lora", "samf/samf_lora"):
        bare = copy_of(name, tmp_path / name.replace("/", "_"))
        (bare / "config.json").unlink()
        assert detect(str(bare)) == FOLDERS[name]
    samf = copy_of("samf/samf_merged", tmp_path / "samf")
    edit(samf / "config.json", mm_fuse_type="absent")
    assert detect(str(samf)) == "samf"
    tiny = copy_of("tinyllava/tinyllava_mini", tmp_path / "tiny")
    for family in ("tinyllava", "llava_llama", "llava"):
        edit(tiny / "config.json", model_type=family)
        assert detect(str(tiny)) == "llava"


def test_towers_without_a_config(tmp_path):
    """M3D-CLIP's released encoder, DINO's file (a teacher's, too), and CLIP with its text half."""
    clip = load_file(GOLDEN / "vit3d/m3d_clip/model.safetensors")
    vit = {name.removeprefix("vision_encoder."): value for name, value in clip.items() if name.startswith("vision_encoder.")}
    samf = load_file(GOLDEN / "samf/ao2d_merged/model.safetensors")
    prefix = "model.vision_tower.vision_tower."
    dino = {name.removeprefix(prefix): value for name, value in samf.items() if name.startswith(prefix)}
    teacher = {f"module.backbone.{name}": value for name, value in dino.items()} | {"module.head.mlp.0.bias": torch.zeros(2)}
    for i, (file, tensors) in enumerate(
        [("pretrained_ViT.bin", vit), ("dino_vitbase16.pth", dino), ("any.bin", teacher), ("pytorch_model.bin", clip)]
    ):
        folder = tmp_path / str(i)
        folder.mkdir()
        torch.save(tensors, folder / file)
        (folder / "training_args.bin").write_bytes(b"cos\nsystem\n")
        assert detect(str(folder)) == detect(str(folder / file)) == "tower"
    torch.save(dino, tmp_path / "0" / "checkpoint.pth")
    assert detect(str(tmp_path / "0")) == "tower"  # the name that M3D-CLIP's release has still decides
    (tmp_path / "0" / "pretrained_ViT.bin").rename(tmp_path / "0" / "other.bin")
    with pytest.raises(UserError, match=r"checkpoint\.pth, other\.bin"):
        detect(str(tmp_path / "0"))


def test_merged_model_beside_safetensors(tmp_path):
    folder = copy_of("vit3d/lamed_merged", tmp_path / "x")
    (folder / "merged_model.bin").write_bytes(b"never opened")
    assert detect(str(folder)) == "lamed"
    torch.save(load_file(folder / "model.safetensors"), folder / "merged_model.bin")
    (folder / "model.safetensors").unlink()
    assert detect(str(folder)) == "lamed"


def test_projectors_alone(tmp_path):
    """M3D's alignment stage saves the embedding table too; TinyLLaVA's last save is config and projector."""
    torch.save(
        {"model.mm_projector.projector.0.weight": torch.zeros(2), "model.embed_tokens.weight": torch.zeros(2)},
        tmp_path / "a.bin",
    )
    assert detect(str(tmp_path / "a.bin")) == "mm_projector"
    root = tmp_path / "root"
    root.mkdir()
    torch.save({"model.mm_projector.0.weight": torch.zeros(2)}, root / "mm_projector.bin")
    shutil.copyfile(GOLDEN / "tinyllava/tinyllava_mini/config.json", root / "config.json")
    assert detect(str(root)) == "mm_projector"


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_transformers_llava(family, tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**sizes, image_size=14, patch_size=7),
        text_config=transformers.AutoConfig.for_model(family, **sizes, vocab_size=23, num_key_value_heads=1),
        image_token_index=5,
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    assert detect(str(tmp_path)) == "llava_hf"


def test_what_is_unknown_is_refused(tmp_path):
    folder = copy_of("vit3d/base", tmp_path / "x")
    edit(folder / "config.json", model_type="lamma")
    with pytest.raises(UserError, match=r"'lamma'.*the nearest that is: llama\)") as error:
        detect(str(folder))
    assert all(what in str(error.value) for what in KINDS.values()) and "\n" not in str(error.value)
    edit(folder / "config.json", model_type="absent")
    with pytest.raises(UserError, match=r"config\.json has no model_type"):
        detect(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"there is no config\.json"):
        detect(str(folder))
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text((GOLDEN / "samf/base/config.json").read_text())
    with pytest.raises(UserError, match="no weights"):
        detect(str(folder))
    assert detect_base(str(folder)) == ""
    assert detect_base(str(GOLDEN / "vit3d/base")) == "hf"


def test_config_and_tensors_that_disagree(tmp_path):
    folder = copy_of("mistral_llava/llava_mistral_short", tmp_path / "x")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if "mm_projector" not in name}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"mm_projector_type 'mlp2x_gelu'.*download"):
        detect(str(folder))
    edit(folder / "config.json", model_type="llava_phi3", mm_projector_type="identity")
    with pytest.raises(UserError, match="SAMF"):
        detect(str(folder))
    plain = copy_of("vit3d/base", tmp_path / "y")
    save_file(
        load_file(plain / "model.safetensors") | {"model.mm_projector.0.bias": torch.zeros(3)}, plain / "model.safetensors"
    )
    with pytest.raises(UserError, match=r"hold a projector.*mm_\* fields"):
        detect(str(plain))
