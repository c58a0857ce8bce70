"""The demo's model: a byte-level LLaMA-style decoder, small enough for a laptop's CPU.

RMSNorm, rotary positions, SwiGLU. With Pre-LN it learns; with Post-LN and no warm-up its feed-forward layers collapse
within seconds (PAPER: "Small scale").
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """Sizes of the decoder."""

    model_dim: int = 64
    width: int = 256
    """D, the feed-forward layers' hidden width."""
    layers: int = 8
    heads: int = 4
    vocabulary: int = 256
    norm: Literal["pre", "post"] = "pre"
    init_std: float | None = None
    """Of every weight matrix; None leaves torch's own initialisation."""


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.model_dim, 3 * config.model_dim, bias=False)
        self.out = nn.Linear(config.model_dim, config.model_dim, bias=False)

    def forward(self, x_BTd: Tensor) -> Tensor:
        batch, time, dim = x_BTd.shape
        heads = self.qkv(x_BTd).view(batch, time, 3, self.heads, dim // self.heads).transpose(1, 3)
        query, key, value = heads.unbind(2)  # each (B, heads, T, dim/heads)
        attended = F.scaled_dot_product_attention(_rotated(query), _rotated(key), value, is_causal=True)
        out: Tensor = self.out(attended.transpose(1, 2).reshape(batch, time, dim))
        return out


class FeedForward(nn.Module):
    """SwiGLU; the input of `down_proj` is what eigenwatch observes."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.model_dim, config.width, bias=False)
        self.up_proj = nn.Linear(config.model_dim, config.width, bias=False)
        self.down_proj = nn.Linear(config.width, config.model_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """Attention and feed-forward, each with its norm before (Pre-LN) or after the residual sum (Post-LN)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(config), FeedForward(config)
        self.attention_norm, self.mlp_norm = nn.RMSNorm(config.model_dim), nn.RMSNorm(config.model_dim)
        self.pre = config.norm == "pre"

    def forward(self, x: Tensor) -> Tensor:
        for norm, inner in ((self.attention_norm, self.attention), (self.mlp_norm, self.mlp)):
            x = x + inner(norm(x)) if self.pre else norm(x + inner(x))
        return x


class Decoder(nn.Module):
    """Bytes in, logits over the next byte out."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.model_dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.model_dim)
        self.head = nn.Linear(config.model_dim, config.vocabulary, bias=False)
        if config.init_std is not None:
            for weight in (one for one in self.parameters() if one.ndim == 2):
                nn.init.normal_(weight, std=config.init_std)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x = self.embedding(tokens_BT)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def _rotated(x: Tensor) -> Tensor:
    """Rotary position embedding of (B, heads, T, dim)."""
    time, dim = x.shape[-2:]
    frequencies = 10_000.0 ** (-torch.arange(0, dim, 2, device=x.device) / dim)
    angles = torch.arange(time, device=x.device)[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
