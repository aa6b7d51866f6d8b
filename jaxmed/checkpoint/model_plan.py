"""The plan of a whole model's export: what goes along with the tensors, and where the manifest says they came from."""

import dataclasses
import os
from typing import Any

from jaxmed.checkpoint.export_config import tokenizer_folder, write_chat_template, write_tokenizer
from jaxmed.checkpoint.export_plan import Plan
from jaxmed.checkpoint.hf_io import base_fingerprint
from jaxmed.config import Experiment
from jaxmed.data.tokenizer import Tokenizer

NO_TOKENIZER = "there is no tokenizer in the source, so none was written"
_OWN = ("config.json", "adapter_config.json", "generation_config.json")


@dataclasses.dataclass(frozen=True)
class ModelPlan(Plan):
    experiment: Experiment = dataclasses.field(kw_only=True)
    """Of what is written"""
    source: Experiment = dataclasses.field(kw_only=True)
    """Where the values are"""
    tokenizer: bool = dataclasses.field(default=True, kw_only=True)
    """Whether the tokenizer goes along"""
    extra_tokens: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)
    """Tokens that the tokenizer gets after the model's own"""

    def about(self) -> dict[str, Any]:
        model = self.source.model
        return {
            "base": {"folder": model.base, "fingerprint": base_fingerprint(model.base)} if model.base else {},
            "tokenizer": tokenizer_folder(self.source) if self.tokenizer else "",
            "added_tokens": list(model.added_tokens),
            "template": self.experiment.data.template,
            "encoder": self.experiment.visual.encoder,
        }

    def settings(self) -> list[str]:
        return [folder for folder in (self.source.model.base, self.source.model.tower_folder) if folder]

    def write_beside(self, folder: str) -> str:
        """The tokenizer; in our own form in a folder of its own."""
        source = tokenizer_folder(self.source)
        if not self.tokenizer or not source:
            return NO_TOKENIZER if self.tokenizer else ""
        model = self.source.model
        if self.to == "orbax":
            own = os.path.join(folder, "tokenizer")
            Tokenizer.from_folder(source, model.added_tokens, model.pad_token).save(own)
            return ""
        before = {name: _read(os.path.join(folder, name)) for name in _OWN}
        write_tokenizer(self.experiment, folder, self.extra_tokens)
        if self.to == "hf":
            write_chat_template(self.experiment, folder)
        for name, text in before.items():  # saving a tokenizer states end ids of its own
            _restore(os.path.join(folder, name), text)
        return ""


def _read(path: str) -> str:
    """ "" if there is no such file"""
    if not os.path.exists(path):
        return ""
    with open(path, encoding="utf-8") as file:
        return file.read()


def _restore(path: str, text: str) -> None:
    if text:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    elif os.path.exists(path):
        os.remove(path)
