"""A tiny LLaVA in torch, spliced as upstream does, and the same model's config."""

import dataclasses

import torch
from torch_pair import BASE, Row, array, decoder_params, text_experiment, torch_llama

from jaxmed.config import ProjectorConfig, VisualConfig

FEATURES, IMAGES, TOKENS = 7, 2, 9
DECODER = dataclasses.replace(BASE, vocab=100)
TEXT = text_experiment(DECODER)
EXPERIMENT = dataclasses.replace(
    TEXT,
    model=dataclasses.replace(TEXT.model, projector=ProjectorConfig("mlp2x_gelu")),
    visual=VisualConfig(images=IMAGES, tokens=TOKENS, features=FEATURES, grid=(1, 3, 3)),
)


class Torch:
    """The published splice: ids cut at each -200, projected tokens between the pieces, -100 over them."""

    def __init__(self):
        self.llama = torch_llama(DECODER)
        torch.manual_seed(5)
        layers = torch.nn.Linear(FEATURES, DECODER.width), torch.nn.GELU(), torch.nn.Linear(DECODER.width, DECODER.width)
        self.projector = torch.nn.Sequential(*layers)

    def splice(self, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
        """-> embeddings [T, D], labels [T]"""
        embeds, labels, images = [], [], iter(row.images)
        for token, label in zip(row.ids, row.labels, strict=True):
            if token == -200:
                piece = self.projector(torch.from_numpy(next(images)))
                embeds.append(piece)
                labels += [-100] * len(piece)
            else:
                embeds.append(self.llama.model.embed_tokens(torch.tensor([token])))
                labels.append(label)
        return torch.cat(embeds), torch.tensor(labels)

    def forward(self, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
        embeds, labels = self.splice(row)
        return self.llama(inputs_embeds=embeds[None]).logits[0], labels

    def params(self) -> dict:
        layers = {
            n: {"weight": array(m.weight), "bias": array(m.bias)} for n, m in ((0, self.projector[0]), (1, self.projector[2]))
        }
        return {"decoder": decoder_params(self.llama, DECODER), "projector": {"layers": layers}}


def length_of(row: Row) -> int:
    return len(row.ids) + sum(len(i) - 1 for i in row.images)
