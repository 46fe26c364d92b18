"""The one decoder: embedding, blocks, norm and head, with per-token NLL. Parameter names are exactly Hugging Face's.

Shapes: B rows · T tokens · C hidden_size · V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minigpt.core.data.batch import IGNORED, Batch
from minigpt.core.models import architecture
from minigpt.core.models.config import ModelConfig
from minigpt.core.nn.attention import Attention
from minigpt.core.nn.cache import KV, Cache, LayerCache
from minigpt.core.nn.layers import MLP, RMSNorm
from minigpt.core.nn.linear import Linear
from minigpt.core.nn.nll import chunked_nll, head_nll
from minigpt.core.nn.rope import RotaryEmbedding
from minigpt.core.nn.seqinfo import SeqInfo

OUTPUTS = ("nll", "logits", "hidden", "entropy")


class ModelOutput(NamedTuple):
    """What a forward hands back; what was not asked for is None."""

    nll: Tensor | None = None  # (B, T) float32 nats, 0 where labels == -100
    logits: Tensor | None = None  # (B, T, V) float32, divided by the temperature
    hidden: Tensor | None = None  # (B, T, C) after the final norm
    entropy: Tensor | None = None  # (B, T) float32 nats, 0 where labels == -100
    values: Tensor | None = None  # (B, T)
    aux: dict[str, Tensor] = {}  # noqa: RUF012  (never changed)


class Block(nn.Module):
    """Pre-norm residual block: x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, mixer: Attention, mlp: MLP, hidden_size: int, eps: float):
        super().__init__()
        self.input_layernorm = RMSNorm(hidden_size, eps)
        self.self_attn = mixer
        self.post_attention_layernorm = RMSNorm(hidden_size, eps)
        self.mlp = mlp

    def forward(self, x: Tensor, seq: SeqInfo, cache: LayerCache | None = None) -> Tensor:
        """x: (B, T, C). Returns (B, T, C)."""
        x = x + self.self_attn(self.input_layernorm(x), seq, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Stack(nn.Module):
    """What Hugging Face calls `model`: everything but the head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        make_block = architecture(config.model_type).make_block
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(make_block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """A causal language model of any registered architecture."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.attention_path: str | None = None  # `documents` or `sdpa` forces one; SeqInfo chooses otherwise
        self.recompute = False  # in training keep a block's input alone, and compute the block again in backward
        self.rotary = RotaryEmbedding(config.rope_parameters, config.head_size)
        self.model = Stack(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.packed_head: Callable[[Tensor], Tensor] | None = None  # the head laid out for inference
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Matrices from N(0, initializer_range), norms at 1."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=self.config.initializer_range)
            else:
                nn.init.ones_(parameter)

    @property
    def head_weight(self) -> Tensor:
        """(V, C): the embedding itself when tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, batch: Batch, want: Iterable[str] = ("nll",), temperature: float = 1.0) -> ModelOutput:
        """want: any of nll, logits, hidden, entropy. temperature: divides the logits behind all of them."""
        wanted = set(want)
        if unknown := wanted.difference(OUTPUTS):
            raise ValueError(f"a Decoder has no output {sorted(unknown)}; it has {OUTPUTS}")
        hidden = self.hidden(batch.input_ids, batch.position_ids)
        nll = entropy = logits = None
        if wanted & {"nll", "entropy"}:
            nll, entropy = self._nll(hidden, batch.labels, temperature, "entropy" in wanted)
        if "logits" in wanted:
            logits = self.head(hidden) / temperature
        return ModelOutput(nll, logits, hidden if "hidden" in wanted else None, entropy)

    def _nll(self, hidden: Tensor, labels: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor | None]:
        """Only labelled tokens go through the head."""
        flat = labels.flatten()
        used = (flat != IGNORED).nonzero().squeeze(1)
        tokens = hidden.flatten(0, 1)
        if used.numel() < flat.numel():
            tokens, flat = tokens.index_select(0, used), flat.index_select(0, used)
        spread: Tensor | None = None
        if self.packed_head is None:
            nll, spread = chunked_nll(tokens, self.head_weight, flat, temperature, entropy=entropy)
        elif not entropy:
            nll = head_nll(self.head, tokens, flat, temperature)
        else:
            raise ValueError("a model laid out for inference computes no entropy")

        def spill(values: Tensor) -> Tensor:
            return values.new_zeros(labels.numel()).index_copy(0, used, values).view(labels.shape)

        return spill(nll), spill(spread) if entropy and spread is not None else None

    def hidden(self, input_ids: Tensor, position_ids: Tensor, cache: Cache | None = None) -> Tensor:
        """input_ids, position_ids: (B, T). Without a cache every position 0 begins a document of its own; with one,
        rows continue their past. Returns (B, T, C) after the final norm.
        """
        x = self.model.embed_tokens(input_ids)
        if cache is None:
            seq = SeqInfo.packed(position_ids, self.rotary, x.dtype, self.attention_path)
        else:
            seq = SeqInfo.continued(position_ids, self.rotary, x.dtype, cache.end)
        for i, block in enumerate(self.model.layers):
            if self.recompute and cache is None and torch.is_grad_enabled():
                x = checkpoint(block, x, seq, use_reentrant=False, preserve_rng_state=False)  # nothing here is random
            else:
                x = block(x, seq, cache.layer(i) if cache is not None else None)
        return self.model.norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """hidden: (..., C). Returns logits (..., V) in float32."""
        if self.packed_head is not None:
            return self.packed_head(hidden).float()
        return F.linear(hidden, self.head_weight).float()

    def cache_specs(self) -> list[KV]:
        """What each layer wants to remember, in order."""
        return [cast(Block, block).self_attn.cache_spec() for block in self.model.layers]

    def num_parameters(self) -> int:
        """Trainable numbers; a tied embedding counts once."""
        return sum(p.numel() for p in self.parameters())
