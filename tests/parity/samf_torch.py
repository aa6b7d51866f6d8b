"""SAMF's aggregator and fusion in torch, written from the specification, with upstream's names.

Axis letters: B volumes, S slices, C features of a slice, F of a volume, T text, D decoder width.
"""

import torch


class TorchAggregator(torch.nn.Module):
    def __init__(self, width: int, features: int, **changes):
        super().__init__()
        self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, width))
        layer = torch.nn.TransformerEncoderLayer(width, 8, 1024, dropout=0.0, **changes)
        self.transformer_encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.volume_proj = torch.nn.Linear(width, features)

    def forward(self, slices: torch.Tensor) -> torch.Tensor:
        """[B, S, C] -> [B, F]"""
        h = torch.cat([self.cls_token.expand(len(slices), -1, -1), slices], 1)
        return self.volume_proj(self.transformer_encoder(h.transpose(0, 1))[0])


class TorchFusion(torch.nn.Module):
    def __init__(self, kind: str, d_3d: int, d_2d: int, width: int):
        super().__init__()
        self.project_3d, self.project_2d = torch.nn.Linear(d_3d, width), torch.nn.Linear(d_2d, width)
        if kind == "ao2d":
            self.project_text = torch.nn.Linear(width, width)
        self.fusion_layer = torch.nn.Linear((4 if kind == "ao2d" else 3) * width, width)
        self.kind = kind

    def forward(self, f3d: torch.Tensor, f2d: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """[F], [S, C], [T, D] -> [D]"""
        p3, p2 = self.project_3d(f3d), self.project_2d(f2d)
        pt = self.project_text(text) if self.kind == "ao2d" else text
        parts = [p3, (p2 @ p3).softmax(0) @ p2, (pt @ p3).softmax(0) @ pt]
        if self.kind == "ao2d":
            parts.append(((pt @ p2.T).softmax(1) @ p2).mean(0))
        return self.fusion_layer(torch.cat(parts))
