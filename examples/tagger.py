"""A tagger of packed sentences: python examples/tagger.py (it wants onnxruntime and onnxscript).
Packed sequences do not export to ONNX; `lengths=` does, as one LSTM node of two directions."""

import io
from timeit import repeat

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from charrnn_fast import LSTM

B, T, V, E, H = 32, 30, 20, 16, 32


def inside(lengths):
    return torch.arange(T)[:, None] < lengths


def make_sentences():
    """Words [T, B], lengths, and tags: is the word before greater than the one after?"""
    lengths = torch.randint(T // 3, T + 1, (B,))
    lengths[0] = T
    words = torch.randint(1, V, (T, B)) * inside(lengths)
    padded = nn.functional.pad(words, (0, 0, 1, 1))
    return words, lengths, (padded[:-2] > padded[2:]).long()


class Tagger(nn.Module):
    def __init__(self, cls):
        super().__init__()
        self.embedding, self.head = nn.Embedding(V, E), nn.Linear(2 * H, 2)
        self.rnn = cls(E, H, bidirectional=True)

    def forward(self, words, lengths):
        x = self.embedding(words)
        if torch.compiler.is_exporting():
            return self.head(self.rnn(x, lengths=lengths)[0])
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        return self.head(pad_packed_sequence(self.rnn(packed)[0])[0])


def loss_of(model, words, lengths, tags):
    at = inside(lengths)
    return nn.functional.cross_entropy(model(words, lengths)[at], tags[at])


def onnx_difference(model, words, lengths):
    import onnxruntime  # here, so that all else runs without it

    torch.onnx.export(model, (words, lengths), file := io.BytesIO(), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file.getvalue())
    scores = session.run(None, {"words": words.numpy(), "lengths": lengths.numpy()})[0]
    return (torch.from_numpy(scores) - model(words, lengths))[inside(lengths)].abs().max().item()


def main():
    torch.manual_seed(0), torch.set_num_threads(1)
    model, stock = Tagger(LSTM), Tagger(nn.LSTM)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        loss_of(model, *make_sentences()).backward()
        optimizer.step()
    stock.load_state_dict(model.state_dict())
    words, lengths, tags = batch = make_sentences()
    ours, theirs = (each(words, lengths).detach() for each in (model, stock))
    right = (ours.argmax(-1) == tags)[inside(lengths)].float().mean().item()
    for name, each in (("charrnn_fast", model), ("torch.nn", stock)):
        times = repeat(lambda each=each: loss_of(each, *batch).backward(), number=1)
        print(f"{name}: {1e3 * min(times):.2f} ms a training step")
    difference = (ours - theirs).abs().max().item()
    exported = onnx_difference(model.eval(), words, lengths)
    print(f"{right:.0%} of the tags are right; largest difference: {difference:.1e}")
    print(f"largest difference from ONNX Runtime: {exported:.1e}")
    return right, difference, exported


if __name__ == "__main__":
    main()
