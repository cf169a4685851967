from __future__ import annotations

import pytest
import torch
from torch import nn

from charrnn_fast.charlm import CharRNN, ModelConfig, UsageError, build_model
from charrnn_fast.charlm.model import bits

CONFIG = ModelConfig(vocab_size=11, hidden_size=9, num_layers=2)


def test_the_recurrent_module_is_the_one_asked_for():
    import charrnn_fast

    assert type(build_model(CONFIG, "torch").rnn) is nn.RNN
    assert type(build_model(CONFIG, "fast").rnn) is charrnn_fast.RNN
    with pytest.raises(UsageError, match="backend must be one of fast, torch, not 'jax'"):
        build_model(CONFIG, "jax")


def test_shapes(backend):
    logits, state = build_model(CONFIG, backend)(torch.randint(11, (6, 3)))
    assert logits.shape == (6, 3, 11)
    assert [part.shape for part in state] == [(2, 3, 9)]


def test_carrying_the_state_is_reading_on(backend):
    model = build_model(CONFIG, backend, seed=3)
    tokens = torch.randint(11, (6, 3))
    whole, end = model(tokens)
    first, state = model(tokens[:4])
    second, state = model(tokens[4:], state)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    torch.testing.assert_close(state, end)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("init", ["uniform", "orthogonal"])
def test_backends_agree(nonlinearity, init):
    """Same seed, same weights under the same names, same scores and gradients."""
    config = ModelConfig(11, 9, 2, nonlinearity)
    fast, reference = (build_model(config, b, init, seed=5) for b in ("fast", "torch"))
    for (name, a), (other, b) in zip(
        fast.state_dict().items(), reference.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(a, b)
    tokens = torch.randint(11, (6, 3))
    results = []
    for model in (fast, reference):
        logits, state = model(tokens)
        (logits.logsumexp(-1).sum() + sum(part.sum() for part in state)).backward()
        results.append([logits, *state, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_module_that_takes_no_tokens_gets_one_hot():
    """CharRNN knows no class: a plain module is fed vectors of 0 and 1."""

    class Spy(nn.RNN):
        def forward(self, input, hx=None):
            self.seen = input
            return super().forward(input, hx)

    model = CharRNN(ModelConfig(4, 3, 1), Spy(4, 3))
    model(torch.tensor([[2]]))
    assert model.rnn.seen.tolist() == [[[0, 0, 1, 0]]]


def test_orthogonal_weights_are_orthogonal():
    w = build_model(CONFIG, "torch", "orthogonal").rnn.weight_hh_l1
    torch.testing.assert_close(w @ w.T, torch.eye(9))


def test_sigmoid_is_for_the_fast_backend():
    config = ModelConfig(11, 9, 1, "sigmoid")
    build_model(config, "fast")(torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(UsageError, match="no sigmoid"):
        build_model(config, "torch")


@pytest.mark.parametrize(
    "wrong",
    [{"hidden_size": 0}, {"num_layers": 0}, {"dropout": 1.0}, {"nonlinearity": "gelu"}],
)
def test_configurations_that_make_no_sense(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        ModelConfig(11, **wrong)


def test_bits():
    assert bits(torch.tensor(8.0).log().item()) == pytest.approx(3)


def test_orthogonal_weights_are_the_same_for_any_number_of_threads():
    models = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        models.append(build_model(ModelConfig(5, 512, 1), "torch", "orthogonal", seed=1))
        assert torch.get_num_threads() == threads
    for model in models[1:]:
        assert torch.equal(model.rnn.weight_hh_l0, models[0].rnn.weight_hh_l0)
