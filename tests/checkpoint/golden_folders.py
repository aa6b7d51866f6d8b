"""Golden folders of whole vision-language models: copies to change, their experiments, and whether every tensor fits."""

import json
import shutil
from pathlib import Path

from jaxmed.checkpoint.folder_kinds import detect
from jaxmed.checkpoint.multimodal_folders import resolve_folder
from jaxmed.checkpoint.sources import weight_sources
from jaxmed.config import Experiment

GOLDEN = Path(__file__).parents[1] / "golden"
CLIP = str(GOLDEN / "mistral_llava/clip_small46")
SIGLIP = str(GOLDEN / "tinyllava/siglip_mini")


def case(system: str) -> dict:
    return json.loads((GOLDEN / system / "case.json").read_text())


def resolve(folder: str | Path, base: str = "", tower: str = "", **overrides) -> tuple[Experiment, list[str]]:
    """`folder`, `base`: below the golden folder."""
    path, base = str(GOLDEN / folder), str(GOLDEN / base) if base else ""
    given = {name.replace("__", "."): value for name, value in overrides.items()}
    return resolve_folder(detect(path), path, base, tower, given)


def copy_of(name: str, to: Path) -> Path:
    to.mkdir()
    for file in (GOLDEN / name).iterdir():
        shutil.copyfile(file, to / file.name)
    return to


def edit(path: Path, **changes) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))


def check_tensors(experiment: Experiment) -> dict[str, str]:
    """Every row has its tensor, and every other tensor a reason; returns those."""
    sources = weight_sources(experiment)
    names = {name for folder in sources.folders for name in sources.names(folder)}
    wanted = {name for row in sources.rows if not row.same_as for name in row.names()}
    assert wanted <= names
    left = {name: sources.surplus(name) for name in names - wanted}
    assert all(left.values()), left
    return left
