"""How far two models' predictions are apart, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1 << 20  # numbers of a block of logits; some six times as many float64 are held at a time


@dataclass
class Agreement:
    """Sums over predicted tokens, for the predictions q of one model where those of another, p, are right.

    KL(p || q) is the sum over the vocabulary of p (log p - log q), in nats. Where q holds NaN, it is NaN, and the token
    counts as one on which the two disagree.
    """

    tokens: int = 0
    same: int = 0  # tokens for which both have the same likeliest next one
    kl_sum: float = 0.0
    kl_max: float = 0.0
    targets: int = 0  # tokens whose next one is known
    loss_p: float = 0.0  # sum over these of -log p(next)
    loss_q: float = 0.0

    @torch.no_grad()
    def add(self, p: Tensor, q: Tensor, following: Tensor | None = None) -> None:
        """Logits [n, V] of both; `following` [n] are the next tokens, -1 where there is none."""
        rows = max(1, BLOCK // p.shape[-1])
        for start in range(0, len(p), rows):
            part = slice(start, start + rows)
            self._add(p[part], q[part], None if following is None else following[part])

    def _add(self, p: Tensor, q: Tensor, following: Tensor | None) -> None:
        home = p.device if p.device.type in ("cpu", "cuda") else torch.device("cpu")  # others may have no float64
        q = q.to(home)
        log_p, log_q = (each.to(home, torch.float64).log_softmax(-1) for each in (p, q))
        weights = log_p.exp()
        kl = torch.where(weights == 0, 0.0, weights * (log_p - log_q)).sum(-1).clamp_min(0)
        kl = torch.where(log_q.isnan().any(-1), math.nan, kl)
        self.tokens += len(kl)
        self.same += int(((log_p.argmax(-1) == log_q.argmax(-1)) & ~kl.isnan()).sum())
        self.kl_sum += kl.sum().item()
        self.kl_max = torch.stack([kl.max(), kl.new_tensor(self.kl_max)]).max().item()  # NaN stays
        if following is not None:
            known = following >= 0
            index = following.to(home).clamp_min(0)[:, None]
            losses = [-each.gather(-1, index)[:, 0][known.to(home)].sum().item() for each in (log_p, log_q)]
            self.targets += int(known.sum())
            self.loss_p, self.loss_q = self.loss_p + losses[0], self.loss_q + losses[1]

    @property
    def top1(self) -> float:
        """The share of tokens for which both have the same likeliest next one; NaN for none."""
        return self.same / self.tokens if self.tokens else math.nan

    @property
    def mean_kl(self) -> float:
        """Nats per token; NaN for none."""
        return self.kl_sum / self.tokens if self.tokens else math.nan

    @property
    def perplexities(self) -> tuple[float, float]:
        """Of p and of q: exp of the mean loss of all tokens, whatever text they are from."""
        return _exp(self.loss_p, self.targets), _exp(self.loss_q, self.targets)

    def to_dict(self) -> dict[str, float]:
        return {"top1": self.top1, "mean_kl": self.mean_kl, "max_kl": self.kl_max, "tokens": self.tokens}


def _exp(total: float, count: int) -> float:
    try:
        return math.exp(total / count) if count else math.nan
    except OverflowError:
        return math.inf
