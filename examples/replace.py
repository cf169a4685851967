"""Somebody's model, made faster by one line: python examples/replace.py

The model knows nothing of charrnn_fast: a bidirectional LSTM reads, a GRU cell writes.
"""

import copy
from timeit import repeat

import torch
from torch import nn

from charrnn_fast import explain, replace_rnn

B, T, I, H, STEPS = 16, 40, 24, 48, 10


class Somebodys(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.LSTM(I, H, num_layers=2, bidirectional=True, batch_first=True)
        self.decoder = nn.GRUCell(I, 2 * H)
        self.head = nn.Linear(2 * H, I)

    def forward(self, x):
        state = self.encoder(x)[0].mean(1)
        value, values = x[:, -1], []
        for _ in range(STEPS):
            state = self.decoder(value, state)
            value = self.head(state)
            values.append(value)
        return torch.stack(values, 1)


def training_step(model, x, target):
    model.zero_grad()
    loss = nn.functional.mse_loss(model(x), target)
    loss.backward()
    return loss.detach()


def main():
    torch.manual_seed(0), torch.set_num_threads(1)
    stock = Somebodys()
    model = copy.deepcopy(stock)
    report = replace_rnn(model)  # the one line
    print(report)
    x, target = torch.randn(B, T, I), torch.randn(B, STEPS, I)
    print(explain(model.encoder, x))

    for name, each in (("charrnn_fast", model), ("torch.nn", stock)):
        times = repeat(lambda each=each: training_step(each, x, target), number=1)
        print(f"{name}: {1e3 * min(times):.2f} ms a training step")
    gradients = [[p.grad for p in each.parameters()] for each in (model, stock)]
    differences = [(a - b).abs().max().item() for a, b in zip(*gradients, strict=True)]
    print(f"largest difference of the gradients: {max(differences):.1e}")
    report.undo()  # the classes are torch's again; nothing else ever changed
    return report, model, max(differences)


if __name__ == "__main__":
    main()
