"""A forecaster of series of different lengths: python examples/forecaster.py

`lengths=` reads padded histories in any order, and gives the state at the end of each, which is
then carried on. torch.nn packs and sorts for that."""

from timeit import repeat

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from charrnn_fast import GRU

B, T, H, AHEAD = 32, 120, 32, 24


def make_series():
    """Two waves and noise, [T + AHEAD, B, 1], and the length of each history."""
    t = torch.arange(T + AHEAD)[:, None]
    slow, phase = 60 + 60 * torch.rand(B), 6.28 * torch.rand(2, B)
    series = torch.sin(6.28 * t / 12 + phase[0]) + 0.5 * torch.sin(6.28 * t / slow + phase[1])
    return (series + 0.05 * torch.randn(T + AHEAD, B))[..., None], torch.randint(40, T + 1, (B,))


class Forecaster(nn.Module):
    def __init__(self, cls):
        super().__init__()
        self.rnn, self.head = cls(1, H), nn.Linear(H, 1)

    def forward(self, x, lengths):
        """A prediction of the next value after each one, and the state at the end of each."""
        if isinstance(self.rnn, GRU):
            y, h = self.rnn(x, None, lengths)
        else:
            packed, h = self.rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))
            y = pad_packed_sequence(packed, total_length=len(x))[0]
        return self.head(y), h

    @torch.no_grad()
    def forecast(self, x, lengths):
        """AHEAD values after the end of each history: [AHEAD, B, 1]."""
        predicted, h = self(x, lengths)
        values = [predicted[lengths - 1, torch.arange(B)]]
        while len(values) < AHEAD:
            y, h = self.rnn(values[-1][None], h)
            values.append(self.head(y)[0])
        return torch.stack(values)


def loss_of(model, series, lengths):
    inside = torch.arange(T)[:, None] < lengths
    error = model(series[:T], lengths)[0] - series[1 : T + 1]
    return error[inside].square().mean()


def main():
    torch.manual_seed(0), torch.set_num_threads(1)
    model, stock = Forecaster(GRU), Forecaster(nn.GRU)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        loss_of(model, *make_series()).backward()
        optimizer.step()
    stock.load_state_dict(model.state_dict())
    series, lengths = make_series()
    at = lengths + torch.arange(AHEAD)[:, None]
    truth, last = series[at, torch.arange(B)], series[lengths - 1, torch.arange(B)]
    ours, theirs = (each.forecast(series[:T], lengths) for each in (model, stock))
    error, naive = ((guess - truth).square().mean().item() for guess in (ours, last))
    for name, each in (("charrnn_fast", model), ("torch.nn", stock)):
        times = repeat(lambda each=each: loss_of(each, series, lengths).backward(), number=1)
        print(f"{name}: {1e3 * min(times):.2f} ms a training step")
    difference = (ours - theirs).abs().max().item()
    print(f"squared error: {error:.3f}; of repeating the last value: {naive:.3f}")
    print(f"largest difference: {difference:.1e}")
    return error, naive, difference


if __name__ == "__main__":
    main()
