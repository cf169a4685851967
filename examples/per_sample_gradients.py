"""The gradient of each sample apart, by vmap, as private training clips them.

    python examples/per_sample_gradients.py

torch.nn's GRU refuses vmap: there a loop over the samples takes its place.
"""

from timeit import repeat

import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from charrnn_fast import GRU

B, T, I, H, CLASSES, CLIP = 32, 20, 8, 32, 4, 1.0


class Classifier(nn.Module):
    def __init__(self, cls):
        super().__init__()
        self.rnn, self.head = cls(I, H), nn.Linear(H, CLASSES)

    def forward(self, x):
        return self.head(self.rnn(x)[1][0])


def by_vmap(model, x, labels):
    """x [B, T, I], labels [B]; gradients by name, each [B, ...]."""

    def loss(parameters, x, label):
        scores = functional_call(model, parameters, (x[:, None],))
        return nn.functional.cross_entropy(scores, label[None])

    parameters = {name: value.detach() for name, value in model.named_parameters()}
    return vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, labels)


def by_loop(model, x, labels):
    samples = []
    for one, label in zip(x, labels, strict=True):
        loss = nn.functional.cross_entropy(model(one[:, None]), label[None])
        samples.append(torch.autograd.grad(loss, list(model.parameters())))
    names = [name for name, _ in model.named_parameters()]
    return {n: torch.stack(g) for n, g in zip(names, zip(*samples, strict=True), strict=True)}


def clipped(gradients):
    """Their sum, each sample's scaled to a norm of at most CLIP."""
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
    scale = (CLIP / norms).clamp(max=1)
    return {name: torch.tensordot(scale, g, 1) for name, g in gradients.items()}, norms


def main():
    torch.manual_seed(0), torch.set_num_threads(1)
    model, stock = Classifier(GRU), Classifier(nn.GRU)
    stock.load_state_dict(model.state_dict())
    batch = torch.randn(B, T, I), torch.randint(CLASSES, (B,))
    ours, theirs = by_vmap(model, *batch), by_loop(stock, *batch)
    total, norms = clipped(ours)
    print(f"norms of the samples' gradients: {norms.min():.2f} to {norms.max():.2f}")
    print(f"of their clipped sum: {torch.cat([g.flatten() for g in total.values()]).norm():.2f}")
    for name, run, each in (
        ("charrnn_fast, vmap", by_vmap, model),
        ("charrnn_fast, a loop", by_loop, model),
        ("torch.nn, a loop", by_loop, stock),
    ):
        times = repeat(lambda run=run, each=each: run(each, *batch), number=1)
        print(f"{name}: {1e3 * min(times):.2f} ms for {B} samples")
    difference = max((ours[name] - theirs[name]).abs().max().item() for name in ours)
    print(f"largest difference: {difference:.1e}")
    return norms, difference


if __name__ == "__main__":
    main()
