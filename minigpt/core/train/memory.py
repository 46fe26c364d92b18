"""What a training step will take of a device's memory, told before the first step.

Counted from shapes, by reading what autograd keeps in our own layers (core/nn), as Korthikanti et al., 2022
(arXiv:2205.05198, section 4) do it for theirs. The static parts are those of mixed precision with AdamW (Rajbhandari et
al., 2020, arXiv:1910.02054, section 3): float32 weights, gradients and two moments, and a copy to compute with.

No torch here. Shapes: B rows · T tokens a row · N = B T · C hidden_size · F intermediate_size · V vocab_size · H query
heads · K key/value heads · D head_dim · e bytes of a number in the compute precision. All results are bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from minigpt.core.machine import amount
from minigpt.core.models.config import ModelConfig
from minigpt.core.models.folder import create
from minigpt.core.models.presets import PRESETS

FLOAT32, INT64 = 4, 8
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
NORMED_HEADS = ("qwen3",)  # model types with a norm of queries and keys

# Not counted but measured, on processors: short runs of 1m, 3m and 10m in both precisions stay within 17 % of the
# total. Those of GPUs are guesses.
PROCESS = {"cpu": 365 * 10**6, "cuda": 600 * 10**6, "mps": 200 * 10**6}  # Python and torch; what a GPU's driver takes
HOLES = 0.4  # of activations and loss: batches differ in shape, and the heap keeps the gaps that they leave
KERNELS = 400 * 10**6  # oneDNN keeps a compiled bfloat16 product for each shape it met, 1,024 at the most

# Constants of core/nn, which imports torch; a test holds the two together.
LONGEST, QUERIES, GRANULE, CHUNK_BYTES = 1024, 128, 16, 12 << 20


@dataclass(frozen=True)
class Setting:
    """What decides the memory of a step.

    micro_rows: rows computed at once. dtype: of the forward pass. context: `flops.mean_context` of the packed
    documents; None = unknown, taken as whole rows under a mask.
    """

    config: ModelConfig
    micro_rows: int
    max_len: int
    dtype: str
    optimizer: str
    device_type: str
    grad_checkpoint: bool = False
    context: float | None = None
    shards: int = 1  # processes that share weights and moments (`--parallel fsdp`)
    products: str = "float32"  # the type that Muon multiplies in

    @property
    def tokens(self) -> int:
        return self.micro_rows * self.max_len

    @property
    def width(self) -> int:
        return WIDTH[self.dtype]

    @property
    def side_by_side(self) -> bool:
        """Documents are gathered and multiplied on the processor, not by SDPA (nn/seqinfo.py)."""
        return self.device_type == "cpu" and self.max_len <= LONGEST

    @property
    def masked(self) -> bool:
        """SDPA gets a mask: a row holds several documents."""
        return not self.side_by_side and (self.context is None or self.context < self.max_len)


@dataclass(frozen=True)
class Estimate:
    """Bytes by part; which parts there are, `estimate` tells."""

    setting: Setting
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def line(self, available: int | None = None) -> str:
        """`about 1.4 GB of 24.0 GB: activations 812 MB, process 367 MB, optimizer 103 MB`: the three largest parts."""
        largest = sorted(self.parts.items(), key=lambda part: -part[1])[:3]
        room = f" of {amount(available)}" if available is not None else ""
        return f"about {amount(self.total)}{room}: " + ", ".join(f"{name} {amount(size)}" for name, size in largest)

    def advice(self, available: int, *, sized: bool = True) -> str | None:
        """The change that makes it fit, or None when it does as it is.

        In this order: the largest --batch-size, --grad-checkpoint, the largest --size.
        sized: the model is made by --size; False when it is given.
        """
        if self.total <= available:
            return None
        for flags, smaller in _smaller(self.setting, sized):
            need = _of(smaller).total
            if need <= available:
                return f"{flags} would need about {amount(need)}"
        return "neither rows nor size can be small enough: free some memory, or use another --device"


def estimate(
    config: ModelConfig,
    micro_rows: int,
    max_len: int,
    dtype: str,
    optimizer: str,
    device_type: str,
    grad_checkpoint: bool = False,
    context: float | None = None,
    shards: int = 1,
    products: str = "float32",
) -> Estimate:
    """The peak of a training step; arguments as in `Setting`. dtype, products: `bfloat16`, `torch.float32`, ...

    weights      float32 masters
    copies       the matrices in the compute precision, when that is not float32; what is gathered of sharded ones
    gradients    float32, summed over micro-batches
    optimizer    two moments for AdamW, one for Muon's matrices
    activations  what forward keeps for backward: layers * `layer_activations` + `shared_activations`
    loss         chunks of logits and the head's gradient, see `loss_workspace`
    workspace    what a layer's backward (`_workspace`) or the end of the step (`_last`) takes beyond those two
    process      the program itself
    allocator    on a processor, memory that is free but cannot be given back
    kernels      on a processor, compiled products in half precision
    """
    dtype, products = dtype.removeprefix("torch."), products.removeprefix("torch.")
    return _of(
        Setting(config, micro_rows, max_len, dtype, optimizer, device_type, grad_checkpoint, context, shards, products)
    )


def _of(s: Setting) -> Estimate:
    count, inner = parameters(s.config), _inner_matrices(s.config)
    moments = 2 * count - (inner if s.optimizer == "muon" else 0)
    activations, loss = _activations(s), loss_workspace(s)
    parts = {
        "weights": FLOAT32 * count // s.shards,
        "copies": _copies(s),
        "gradients": FLOAT32 * (count if s.shards == 1 else count + count // s.shards),
        "optimizer": FLOAT32 * moments // s.shards,
        "activations": activations,
        "loss": loss,
        "workspace": max(0, _workspace(s) - loss, _last(s) - loss - activations),
        "process": PROCESS[s.device_type],
        "allocator": int(HOLES * (activations + loss)) if s.device_type == "cpu" else 0,
        "kernels": KERNELS if s.device_type == "cpu" and s.width < FLOAT32 else 0,
    }
    return Estimate(s, parts)


def _copies(s: Setting) -> int:
    """The weights as they are computed with. When sharded: those of two blocks, the next one being on its way, and of
    the tables; gradients are whole until the step's last micro-batch, and then in shards besides.
    """
    if s.shards == 1:
        return s.width * _matrices(s.config) if s.width < FLOAT32 else 0
    inner = _inner_matrices(s.config)
    return s.width * (2 * inner // s.config.num_hidden_layers + _matrices(s.config) - inner)


def _smaller(s: Setting, sized: bool) -> Iterator[tuple[str, Setting]]:
    """Settings that take less, with their flags, the best first."""
    for rows in range(s.micro_rows - 1, 0, -1):
        yield f"--batch-size {rows}", replace(s, micro_rows=rows)
    if not s.grad_checkpoint:
        yield "--grad-checkpoint", replace(s, grad_checkpoint=True)
        yield "--grad-checkpoint --batch-size 1", replace(s, grad_checkpoint=True, micro_rows=1)
    configs = {name: create(name, s.config.vocab_size) for name in PRESETS} if sized else {}
    for name, config in sorted(configs.items(), key=lambda item: -parameters(item[1])):
        if parameters(config) < parameters(s.config) and config.max_position_embeddings >= s.max_len:
            yield f"--size {name}", replace(s, config=config)


# ---------------------------------------------------------------------------------------------- weights


def parameters(config: ModelConfig) -> int:
    """Trainable numbers; a tied embedding counts once."""
    heads = 2 * config.head_size if config.model_type in NORMED_HEADS else 0
    gains = config.num_hidden_layers * (2 * config.hidden_size + heads) + config.hidden_size
    return _matrices(config) + gains


def _inner_matrices(config: ModelConfig) -> int:
    """Numbers in the matrices of the blocks: projections of attention, and the MLP."""
    attention = 2 * config.hidden_size * config.head_size * (config.num_attention_heads + config.kv_heads)
    return config.num_hidden_layers * (attention + 3 * config.hidden_size * config.intermediate_size)


def _matrices(config: ModelConfig) -> int:
    tables = 1 if config.tie_word_embeddings else 2
    return _inner_matrices(config) + tables * config.vocab_size * config.hidden_size


# ---------------------------------------------------------------------------------------------- kept for backward


def _activations(s: Setting) -> int:
    """With checkpointing every layer keeps its input alone, and one at a time is computed again in full."""
    layers, whole = s.config.num_hidden_layers, layer_activations(s)
    if s.grad_checkpoint:
        return layers * s.tokens * s.config.hidden_size * s.width + whole + shared_activations(s)
    return layers * whole + shared_activations(s)


def layer_activations(s: Setting) -> int:
    """One block. Numbers a token in the compute precision:

    4 C         input of each norm, and of the projections behind it (each norm's result, shared by its projections)
    H D         input of o_proj
    (H + 2 K) D queries, keys and values, as attention multiplies them, padding included
    4 F         gate, silu(gate), up, and their product
    (H + K) D   queries and keys before their norm, where there is one

    and in float32 each norm's 1 / rms; besides, what attention keeps of its weights.
    """
    c = s.config
    normed = c.num_attention_heads + c.kv_heads if c.model_type in NORMED_HEADS else 0
    slots = _padded(s) / (s.context or s.max_len) if s.side_by_side else 1.0
    heads = c.num_attention_heads + slots * (c.num_attention_heads + 2 * c.kv_heads) + normed
    numbers = 4 * c.hidden_size + heads * c.head_size + 4 * c.intermediate_size
    return int(s.tokens * (numbers * s.width + (2 + normed) * FLOAT32)) + _attention_weights(s)


def _attention_weights(s: Setting) -> int:
    """Side by side, the weights of every query and head over the keys of its block, padding included. SDPA computes
    them anew and keeps their log-sum in float32; rows of several documents add their mask, (B, T, T), as numbers.
    """
    heads = s.config.num_attention_heads
    if s.side_by_side:
        padded = _padded(s)
        ends = [min(begin + QUERIES, padded) for begin in range(0, padded, QUERIES)]
        seen = sum((end - begin) * end for begin, end in zip([0, *ends], ends, strict=False))  # of one document
        return int(s.tokens * heads * seen / (s.context or s.max_len) * s.width)
    return s.tokens * (heads * FLOAT32 + (s.max_len * s.width if s.masked else 0))


def _padded(s: Setting) -> int:
    """Slots of a document of mean length beside others up to a quarter longer (nn/seqinfo.py); a row is full."""
    length = s.context or s.max_len
    return -(-min(s.max_len, round(max(1.1 * length, length + GRANULE / 2))) // GRANULE) * GRANULE


def shared_activations(s: Setting) -> int:
    """Once a model: input and result of the last norm, cos and sin, ids, labels and their places, the mask as it is."""
    numbers = 2 * s.config.hidden_size + 2 * s.config.head_size
    mask = s.tokens * s.max_len if s.masked else 0
    return s.tokens * (numbers * s.width + 2 * FLOAT32 + 3 * INT64) + mask


# ---------------------------------------------------------------------------------------------- passing


def loss_workspace(s: Setting) -> int:
    """nn/nll.py: n rows of logits at a time. Forward holds them once as computed and twice in float32; backward twice
    as computed, with the head's gradient and three tensors as wide as the hidden state, one of them float32.

    The head's gradient is summed in float32 from products in the compute precision, which a processor widens first.
    """
    c = s.config
    rows = min(s.tokens, max(64, CHUNK_BYTES // (FLOAT32 * c.vocab_size)))
    forward = rows * c.vocab_size * (s.width + 2 * FLOAT32)
    head = FLOAT32
    if s.width < FLOAT32:
        head += s.width + (FLOAT32 if s.device_type == "cpu" else 0)
    hidden = s.tokens * c.hidden_size * (2 * s.width + FLOAT32)
    return max(forward, rows * c.vocab_size * 2 * s.width + c.vocab_size * c.hidden_size * head + hidden)


def _workspace(s: Setting) -> int:
    """Backward of one block: two gradients as wide as the MLP, before what it kept is freed. Attention's turn comes
    when that is gone, and takes less.
    """
    return s.tokens * s.width * 2 * s.config.intermediate_size


def _last(s: Setting) -> int:
    """What comes when activations and loss are gone: the table of tokens gets its gradient, tied to the head that one,
    the head's and their sum; then Muon's largest stack of matrices of one shape: a copy in float32, and in the type of
    its products what it is and becomes, and twice the product with itself.
    """
    c = s.config
    table = c.vocab_size * c.hidden_size * s.width * (3 if c.tie_word_embeddings else 1)
    width = WIDTH[s.products]
    row = c.intermediate_size * (FLOAT32 + 2 * width) + 2 * width * c.hidden_size
    stack = 2 * c.num_hidden_layers * c.hidden_size * row
    return max(table, stack if s.optimizer == "muon" else 0)
