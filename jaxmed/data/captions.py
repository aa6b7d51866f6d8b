"""Requests for a report, where a data set has none of its own: a list of paraphrases, or the user's file.

Training draws one of them for a sample, by (seed, epoch, sample); evaluation and generation ask with the first, always. A
prompt with `{region}` asks for the report of one region (AMOS-MM), one without for the report of the whole volume.
"""

import json
from dataclasses import dataclass

from jaxmed.errors import UserError

REGION = "{region}"
CAPTION_PROMPTS = (
    "Write down what this scan shows.",
    "Give a radiologist's account of this volume.",
    "Which findings does this examination hold?",
    "Report on the images at hand.",
    "Summarise the findings of this study in full sentences.",
    "What would a radiology report say about this scan?",
    "Go through this volume and note every finding.",
    "Please dictate the findings section for this examination.",
    "State what is normal and what is not in this scan.",
    "Put the content of these slices into words.",
    "Read this study and write up your findings.",
    "What stands out on this examination?",
    "Draft the findings for the attached volume.",
    "Compose a report from these images.",
    "Tell me what a careful reader finds in this scan.",
    "List the observations that this study supports.",
    "Turn this volume into a written report.",
    "How would you word the report of this examination?",
    "Look through all slices and describe the anatomy and any disease.",
    "Set out the findings of this study, organ by organ.",
    "What do the images of this patient reveal?",
    "Document this examination for the referring physician.",
    "Record everything of note in this volume.",
    "Please interpret the scan and put it in writing.",
    "Offer a full reading of this three-dimensional study.",
    "Explain what can be seen across these slices.",
    "Provide the narrative part of the report for this scan.",
    "Which normal and abnormal features are visible here?",
    "Let me have the findings of this volume as running text.",
    "Report this examination as you would in daily practice.",
    "Characterise what this volume contains.",
    "Note the state of each structure that this scan covers.",
    "Your reading of this study, please.",
    "Write the body of a radiology report on this volume.",
    "Is there anything remarkable in this scan? Report in full.",
    "From these images alone, what are the findings?",
    "Formulate a caption that does justice to this volume.",
    "Work out the findings of this examination and phrase them as a report.",
    "Kindly supply a written description of this study.",
    "Recount the findings that the slices of this volume show.",
)
"""Requests for a caption, where a row has no question of its own. The first one is used unless others are asked for."""
REGION_PROMPTS = ("please give a detailed account of the findings in the {region} of this image.",)
"""Requests for the report of one region; the published system used one fixed request too."""


@dataclass(frozen=True)
class Prompts:
    captions: tuple[str, ...] = CAPTION_PROMPTS
    regions: tuple[str, ...] = REGION_PROMPTS
    """With `{region}`"""

    def of(self, region: str) -> tuple[str, ...]:
        """Requests for the report of a region, "" for that of the whole volume."""
        return tuple(prompt.replace(REGION, region) for prompt in self.regions) if region else self.captions


FIXED = Prompts(CAPTION_PROMPTS[:1], REGION_PROMPTS[:1])


def read_prompts(path: str) -> Prompts:
    """A text file with a prompt a line, or a JSON list; "" gives the lists above. A kind that the file lacks stays as it is."""
    if not path:
        return Prompts()
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        lines = json.loads(text) if path.lower().endswith(".json") else text.splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); write a prompt a line (data.prompts)") from error
    except ValueError as error:
        raise UserError(f"{path}: is no list of prompts ({error}); write a prompt a line, in UTF-8") from error
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise UserError(f"{path}: must hold a JSON list of texts")
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise UserError(f"{path}: holds no prompt; write at least one (data.prompts)")
    captions = tuple(line for line in found if REGION not in line)
    regions = tuple(line for line in found if REGION in line)
    return Prompts(captions or CAPTION_PROMPTS, regions or REGION_PROMPTS)
