"""Small transformers with seeded weights, as torch's exporter writes them with a free batch size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import onnx_ir as ir
import torch
from torch import nn
from torch.nn import functional

from edgewise.optimizer import files
from edgewise.optimizer.torch_export import to_model

WIDTH, HEADS, LENGTH, WORDS = 64, 4, 24, 100


class Bert(nn.Module):
    """Word and position embeddings, two post-norm layers, a pooled answer; padding is masked."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, eps=1e-12)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.1, nn.GELU(), batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.pooler, self.answer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        place = torch.arange(ids.shape[1], device=ids.device)
        x = self.norm(self.words(ids) + self.positions(place))
        x = self.layers(x, src_key_padding_mask=mask == 0)
        return x, self.answer(torch.tanh(self.pooler(x[:, 0])))


class Block(nn.Module):
    """A pre-norm layer of a GPT: causal attention from one projection, then a wide GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.before(x)).chunk(3, -1)
        q, k, v = (p.view(batch, length, HEADS, width // HEADS).transpose(1, 2) for p in parts)
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.narrow(functional.gelu(self.wide(self.between(x)), approximate="tanh"))


class Gpt(nn.Module):
    """Embeddings, two blocks, and the embedding once more to score the next word."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks, self.norm = nn.Sequential(Block(), Block()), nn.LayerNorm(WIDTH)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        place = torch.arange(ids.shape[1], device=ids.device)
        x = self.norm(self.blocks(self.words(ids) + self.positions(place)))
        return x @ self.words.weight.T


def bert() -> ir.Model:
    return to_model(Bert(), [f"ids=2x{LENGTH}:int64", f"mask=2x{LENGTH}:int64"])


def gpt() -> ir.Model:
    return to_model(Gpt(), [f"ids=2x{LENGTH}:int64"])


MODELS: Mapping[str, Callable[[], ir.Model]] = MappingProxyType({"bert": bert, "gpt": gpt})


def exported(name: str, folder: Path) -> Path:
    """The .onnx file of a network in `folder`, exported if it is not there yet."""
    path = folder / f"{name}.onnx"
    if not path.exists():
        torch.manual_seed(0)
        files.save(MODELS[name](), path)
    return path
