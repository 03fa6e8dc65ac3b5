"""Decoder-only transformer of GPT-2 (Radford et al., Language Models are Unsupervised Multitask Learners, 2019).

Pre-norm blocks, learnt positions, tanh-approximated GELU and GPT-2's initialisation; unlike there, the output layer has
weights of its own, so that the first and the last layer can lie on different pipeline stages.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

_STD = 0.02


class Embedding(nn.Module):
    """Token ids (examples, tokens) → (examples, tokens, width): the token's vector plus its position's."""

    def __init__(self, context: int, vocabulary: int, width: int, dropout: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.tokens(x) + self.positions.weight[: x.shape[1]])


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which each token sees itself and those before it; (examples, tokens, width) → same.

    `qkv` gives the stacked channels q | k | v. `num_heads` are the heads in this module, and their size follows from
    the channels: tensor parallelism leaves some of the heads here.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return self.proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); (examples, tokens, width) → same."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = CausalSelfAttention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


def build_gpt(context: int, num_classes: int, layers: int, heads: int, width: int, dropout: float) -> nn.Sequential:
    """`layers` blocks of `width` channels and `heads` heads, which divide the width.

    Takes token ids (examples, at most `context` tokens) int64, gives logits (examples, tokens, num_classes). A plain
    sequence: embedding, blocks, norm, head. Weights as in Radford et al. (2019), section 2.3, with the standard
    deviation of their code: 0.02, divided by √(2·layers) where a block's output is added to the residual path.
    """
    sequence: OrderedDict[str, nn.Module] = OrderedDict()
    sequence["embedding"] = Embedding(context, num_classes, width, dropout)
    for index in range(layers):
        sequence[f"block_{index}"] = Block(width, heads, dropout)
    sequence["norm"] = nn.LayerNorm(width)
    sequence["head"] = nn.Linear(width, num_classes, bias=False)
    model = nn.Sequential(sequence)
    _apply_weights(model, layers)
    return model


def _apply_weights(model: nn.Module, layers: int) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=_STD)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, Block):
            for residual in (module.attention.proj, module.mlp[-1]):
                nn.init.normal_(residual.weight, std=_STD / math.sqrt(2 * layers))  # type: ignore[arg-type]
