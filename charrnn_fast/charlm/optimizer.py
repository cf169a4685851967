"""The optimizer: a few calls a step, however many weights there are, and however small.

Its sums have a fixed order: the same bits for any number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

LINE = 16  # numbers of a cache line, where each weight begins
ROWS = 64  # a long vector is summed in so many rows, each by one thread: a deterministic norm
ALONE = 2**14  # numbers that PyTorch never divides among threads


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), on one vector.

    With ``average``, a decay below 1, an exponential average of the weights is kept besides (Polyak
    and Juditsky 1992). Its decay begins lower, so that the initial weights are soon forgotten.

    All weights of a model become views of one vector, and their gradients of another one: names and
    shapes stay, but ``grad`` is never None, and is to be filled anew after ``zero_grad``.
    """

    def __init__(
        self,
        model: nn.Module,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        average: float = 0.0,
    ) -> None:
        self.betas, self.decay, self.count = betas, average, 0
        parameters = list(model.parameters())
        self.weight_decay = weight_decay
        self.names = [name for name, _ in model.named_parameters()]
        self.shapes = [p.shape for p in parameters]
        size = round_up(sum(round_up(p.numel(), LINE) for p in parameters), ROWS * LINE)
        self.weights, self.gradients, self.exp_avg, self.exp_avg_sq = (
            parameters[0].detach().new_zeros(size) for _ in range(4)
        )
        self.steps = torch.zeros((), device=self.weights.device)
        views = zip(parameters, self._views(self.weights), self._views(self.gradients), strict=True)
        for parameter, weight, gradient in views:
            parameter.data = weight.copy_(parameter.detach())
            parameter.grad = gradient
        self.average = self.weights.clone() if average else None

    def zero_grad(self) -> None:
        self.gradients.zero_()

    def step(self, rate: float, limit: float) -> Tensor:
        """One step; returns the norm of the gradients, which are scaled down to ``limit`` first
        where it is greater (0: no limit)."""
        norms = self.gradients
        if norms.numel() > ALONE:
            norms = torch.linalg.vector_norm(norms.view(ROWS, -1), dim=1)
        norm: Tensor = torch.linalg.vector_norm(norms)
        self.steps += 1
        torch._fused_adamw_(
            [self.weights],
            [self.gradients],
            [self.exp_avg],
            [self.exp_avg_sq],
            [],
            [self.steps],
            lr=rate,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=self.weight_decay,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
            grad_scale=(norm / limit).clamp_(min=1.0) if limit else None,
        )
        if self.average is not None:
            self.count += 1
            decay = min(self.decay, self.count / (self.count + 10))
            self.average.lerp_(self.weights, 1 - decay)
        return norm

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the model has the average of its weights, where one is kept."""
        if self.average is None:
            yield
            return
        last = self.weights.clone()
        self.weights.copy_(self.average)
        try:
            yield
        finally:
            self.weights.copy_(last)

    def averages(self) -> dict[str, Tensor]:
        """The averages by the names of the weights; no copies. Empty where none are kept."""
        if self.average is None:
            return {}
        return dict(zip(self.names, self._views(self.average), strict=True))

    def load_averages(self, averages: dict[str, Tensor]) -> None:
        """Copies what ``averages`` gave; to be called after ``load_state``."""
        for name, own in self.averages().items():
            own.copy_(averages[name])
        self.count = int(self.steps.item())

    def state(self) -> dict[str, Tensor]:
        """The state as ``load_state`` reads it: ``step``, and for each weight ``NAME.exp_avg`` and
        ``NAME.exp_avg_sq``; no copies."""
        state = {"step": self.steps}
        for key, vector in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
            for name, view in zip(self.names, self._views(vector), strict=True):
                state[f"{name}.{key}"] = view
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Copies what ``state`` gave.

        Raises:
            KeyError: a tensor is missing.
            ValueError: a tensor has another shape.
        """
        for key, own in self.state().items():
            if state[key].shape != own.shape:
                raise ValueError(
                    f"the optimizer's state of {key} is {tuple(state[key].shape)}, "
                    f"expected {tuple(own.shape)}"
                )
            own.copy_(state[key])

    def _views(self, vector: Tensor) -> Iterator[Tensor]:
        start = 0
        for shape in self.shapes:
            yield vector[start : start + shape.numel()].view(shape)
            start += round_up(shape.numel(), LINE)


def round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit
