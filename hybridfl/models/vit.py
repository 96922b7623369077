"""Vision Transformer."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hybridfl.build import NonNegativeInt, PositiveFloat, PositiveInt, Range
from hybridfl.errors import ConfigError
from hybridfl.models.width import largest_divisor, scaled

EPS = 1e-6  # of every LayerNorm, as in the authors' code


class ViT(nn.Module):
    """Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929), eq. 1 to 4, at a size for small images.

    Patches are projected to ``dim`` features, learned positions added, and ``depth`` blocks of attention and a two-layer
    MLP follow, each with LayerNorm before it.

    With ``width`` w there are ``heads · w`` heads, rounded half up and at least 1, and a head has ``dim · w`` divided by
    that number, rounded alike; so a head keeps its dimension wherever ``heads · w`` is a whole number, and the features are
    a multiple of the heads always.

    Args:
        input_shape: ``(channels, height, width)``.
        classes: number of logits.
        patch: side of a patch in pixels; must divide the sides of the image.
        dim: features of a token; a multiple of ``heads``.
        depth: number of blocks.
        heads: of the attention.
        mlp_ratio: hidden features of the MLP for each feature of a token.
        pooling: the head reads an extra class token, or the mean of the tokens.
        dropout: share set to 0 in training: of the embedded patches and of what each block adds.
        width: factor on ``dim``, ``heads`` and the MLP's hidden features.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        classes: int,
        patch: PositiveInt = 4,
        dim: PositiveInt = 64,
        depth: NonNegativeInt = 6,
        heads: PositiveInt = 4,
        mlp_ratio: PositiveFloat = 4.0,
        pooling: Literal["token", "mean"] = "token",
        dropout: Annotated[float, Range(low=0, below=1)] = 0.0,
        width: PositiveFloat = 1.0,
    ) -> None:
        super().__init__()
        inputs, rows, columns = input_shape
        if rows % patch or columns % patch:
            side = next(p for p in range(min(patch, rows, columns), 0, -1) if rows % p == 0 and columns % p == 0)
            problem = f"got {patch}, which does not divide images of {rows} × {columns} pixels"
            raise ConfigError("patch", f"{problem}; nearest valid value: {side}.")
        if dim % heads:
            problem = f"got {heads}, which does not divide dim={dim}"
            raise ConfigError("heads", f"{problem}; nearest valid value: {largest_divisor(dim, heads)}.")
        number = scaled(heads, width)
        features = number * scaled(dim, width / number)
        hidden = scaled(scaled(dim, mlp_ratio), width)
        tokens = (rows // patch) * (columns // patch)
        self.embedding = nn.Conv2d(inputs, features, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, features)) if pooling == "token" else None
        self.positions = nn.Parameter(torch.empty(1, tokens + (pooling == "token"), features))
        self.dropout = _dropout(dropout)
        self.blocks = nn.Sequential(*(Block(features, number, hidden, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(features, eps=EPS)
        self.head = nn.Linear(features, classes)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """``(b, channels, height, width)`` → logits ``(b, classes)``."""
        x = self.embedding(x).flatten(2).transpose(1, 2)
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = self.norm(self.blocks(self.dropout(x + self.positions)))
        logits: Tensor = self.head(x.mean(1) if self.token is None else x[:, 0])
        return logits


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, features: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(features, eps=EPS)
        self.attention = Attention(features, heads)
        self.norm2 = nn.LayerNorm(features, eps=EPS)
        self.mlp = MLP(features, hidden)
        self.dropout = _dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        out: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return out


class Attention(nn.Module):
    """Self-attention of ``heads`` heads; the rows of ``qkv`` are queries, keys and values, each by head."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(features, 3 * features)
        self.projection = nn.Linear(features, features)
        for weight in (*self.qkv.weight.detach().chunk(3), self.projection.weight):
            nn.init.xavier_uniform_(weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.projection.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(b, tokens, features)`` → the same shape."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # Written out: the fused kernels have no forward derivative, no second one, and other numbers on other devices.
        with sdpa_kernel(SDPBackend.MATH):
            mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.projection(mixed.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """Two dense layers with GELU between them."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(features, hidden), nn.Linear(hidden, features)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


def _dropout(share: float) -> nn.Module:
    return nn.Dropout(share) if share else nn.Identity()
