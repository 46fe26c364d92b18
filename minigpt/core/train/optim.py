"""The weights that are trained and what moves them: float32 masters, AdamW and Muon, state by parameter name."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minigpt.core.errors import DataError
from minigpt.core.groups import OptimConfig
from minigpt.core.train.adamw import AdamW
from minigpt.core.train.muon import Muon
from minigpt.core.train.sharded import part


class Masters:
    """float32 weights behind a model that computes in a narrower type.

    The matrices of the model are cast once an optimizer step, not at every use; their gradients are added up in
    float32 over the micro-batches. With a float32 model the masters are the parameters themselves.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self.model = model
        self.named: dict[str, Tensor] = {}
        self._pairs: list[tuple[nn.Parameter, Tensor]] = []
        self._joined: Tensor | None = None
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            if dtype == torch.float32 or p.ndim < 2:  # norms stay float32: they are small, and scale everything
                self.named[name] = p
                continue
            master = p.detach().float().clone()
            p.data = p.data.to(dtype)
            p.register_post_accumulate_grad_hook(_adds_to(master))
            self.named[name] = master
            self._pairs.append((p, master))

    @torch.no_grad()
    def publish(self) -> None:
        """Cast the masters into the model."""
        if self._pairs:
            torch._foreach_copy_([p.data for p, _ in self._pairs], [m for _, m in self._pairs])

    def gradients(self) -> list[Tensor]:
        return [m.grad for m in self.named.values() if m.grad is not None]

    def join_gradients(self) -> Tensor:
        """Let all gradients lie in one buffer, in the order of the names, so that one reduction serves them all.

        Returns the buffer, float32.
        """
        sizes = [m.numel() for m in self.named.values()]
        self._joined = torch.zeros(sum(sizes), device=next(iter(self.named.values())).device)
        for m, piece in zip(self.named.values(), self._joined.split(sizes), strict=True):
            m.grad = piece.view_as(m)
        return self._joined

    def zero_grad(self) -> None:
        if self._joined is not None:
            self._joined.zero_()
            return
        for m in self.named.values():
            m.grad = None

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Copy `state` in by name. Names were checked by the checkpoint."""
        for name, master in self.named.items():
            master.copy_(part(state[name], master))
        self.publish()


def _adds_to(master: Tensor):  # type: ignore[no-untyped-def]
    def hook(p: Tensor) -> None:
        assert p.grad is not None
        if master.grad is None:
            master.grad = p.grad.float()
        else:
            master.grad += p.grad
        p.grad = None

    return hook


class Optimizer:
    """AdamW on everything, or Muon on the blocks' matrices with AdamW on the rest. Decay on matrices only.

    Its state is addressed by parameter name, so a checkpoint does not depend on parameter order or grouping.
    """

    def __init__(self, named: dict[str, Tensor], cfg: OptimConfig):
        self.named = named
        matrices = {n: p for n, p in named.items() if p.ndim >= 2}
        vectors = [p for p in named.values() if p.ndim < 2]
        inner = {n: p for n, p in matrices.items() if cfg.optimizer == "muon" and p.ndim == 2 and _in_block(n)}
        outer = [p for n, p in matrices.items() if n not in inner]
        self._fused = all(p.device.type in ("cpu", "cuda") for p in named.values())
        adamw = AdamW([(outer, cfg.weight_decay), (vectors, 0.0)], (cfg.beta1, cfg.beta2), cfg.eps, self._fused)
        muon = Muon(list(inner.values()), cfg.weight_decay)
        self.rules: list[AdamW | Muon] = [rule for rule in (adamw, muon) if rule.params]
        self._rule = {p: rule for rule in self.rules for p in rule.params}

    def step(self, lr: float) -> None:
        for rule in self.rules:
            rule.step(lr)

    def state_dict(self) -> dict[str, Tensor]:
        """`<parameter>/<field>` → tensor."""
        return {
            f"{name}/{field}": value
            for name, p in self.named.items()
            for field, value in self._rule[p].state.get(p, {}).items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Undo of `state_dict`. DataError when a parameter has state and no place, or a place of another shape."""
        fields: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, _, field = key.rpartition("/")
            fields.setdefault(name, {})[field] = value
        if unknown := sorted(set(fields) - set(self.named)):
            raise DataError(
                f"the optimizer state does not fit this model: it has {unknown[0]}, which the model has not",
                fix="resume with the same --optimizer and model, or start a new run with --model",
            )
        for name, own in fields.items():
            p = self.named[name]
            for value in own.values():
                if value.ndim and value.shape != p.shape:
                    raise DataError(f"the optimizer state of {name} has another shape than the weight")
            self._rule[p].state[p] = {field: self._placed(value, p) for field, value in own.items()}

    def _placed(self, value: Tensor, p: Tensor) -> Tensor:
        """A loaded value where the optimizer wants it: moments beside their weight; a step count, which is a number,
        beside it only for the fused step.
        """
        if value.ndim:
            return part(value.to(p.device, copy=True), p)
        return value.to(p.device if self._fused else "cpu", copy=True)


def _in_block(name: str) -> bool:
    """Muon is for matrices that map features to features, not for tables of tokens."""
    return ".layers." in name
