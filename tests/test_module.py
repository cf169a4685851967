"""What a module is beside its computation: construction, state, copies, hooks, weight lists."""

import contextlib
import copy
import io
import pickle

import pytest
import torch
from helpers import cells, pair
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import charrnn_fast


def test_constructor_takes_the_same_arguments():
    """Positional and keyword arguments, device and dtype mean what they mean in nn.RNN."""
    positional = (3, 5, 2, "relu", False, True, 0.25, True)
    keywords = dict(
        zip(
            [
                "input_size",
                "hidden_size",
                "num_layers",
                "nonlinearity",
                "bias",
                "batch_first",
                "dropout",
                "bidirectional",
            ],
            positional,
            strict=True,
        )
    )
    for ours in (
        charrnn_fast.RNN(*positional, device="cpu", dtype=torch.float64),
        charrnn_fast.RNN(**keywords, device="cpu", dtype=torch.float64),
    ):
        stock = nn.RNN(*positional, device="cpu", dtype=torch.float64)
        assert repr(ours) == repr(stock)
        assert ours.__dict__.keys() == stock.__dict__.keys()
        for name in (*keywords, "mode"):
            assert getattr(ours, name) == getattr(stock, name), name
        assert [p.dtype for p in ours.parameters()] == [torch.float64] * 8
        assert isinstance(ours, nn.RNN)


def test_same_seed_same_weights():
    """The parameters are drawn as nn.RNN draws them."""
    torch.manual_seed(3)
    stock = nn.RNN(3, 5, 2, bidirectional=True)
    torch.manual_seed(3)
    ours = charrnn_fast.RNN(3, 5, 2, bidirectional=True)
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        assert torch.equal(a, b)


def test_sigmoid_shows_in_repr():
    """A sigmoid network says so; it is not nn.RNN's default."""
    assert "sigmoid" in repr(charrnn_fast.RNN(2, 3, nonlinearity="sigmoid"))
    assert charrnn_fast.RNN(2, 3, 1, "sigmoid").nonlinearity == "sigmoid"


def test_weight_lists():
    """all_weights, _flat_weights and flatten_parameters are nn.RNN's."""
    stock, ours = pair(3, 5, 2, bidirectional=True)
    ours.flatten_parameters()
    assert [len(w) for w in ours.all_weights] == [len(w) for w in stock.all_weights]
    assert ours._flat_weights_names == stock._flat_weights_names
    assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))


def test_state_dict_both_ways():
    """A state_dict of either module loads into the other, through a file too."""
    stock, ours = nn.RNN(3, 5, 2), charrnn_fast.RNN(3, 5, 2)
    stock.load_state_dict(ours.state_dict())
    buffer = io.BytesIO()
    torch.save(stock.state_dict(), buffer)
    buffer.seek(0)
    other = charrnn_fast.RNN(3, 5, 2)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(4, 2, 3)
    assert torch.equal(ours(x)[0], other(x)[0])
    torch.testing.assert_close(ours(x)[0], stock(x)[0])


@pytest.mark.parametrize("nonlinearity", ["tanh", "sigmoid"])
def test_copies(nonlinearity):
    """deepcopy and pickle give a module of the same results with weights of its own."""
    ours = charrnn_fast.RNN(3, 5, 2, nonlinearity)
    x = torch.randn(4, 2, 3)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for copied in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(copied) is charrnn_fast.RNN
        assert torch.equal(copied(x)[0], ours(x)[0])
        with torch.no_grad():
            copied.weight_hh_l0.zero_()
        assert not torch.equal(copied(x)[0], ours(x)[0])


def untouched(module):
    pass


def hooked(module):
    module.register_forward_hook(lambda *args: None)


def normed(module):
    name = "weight_hh" if isinstance(module, nn.RNNCellBase) else "weight_hh_l0"
    nn.utils.parametrizations.weight_norm(module, name)


@pytest.mark.parametrize("change", [untouched, hooked, normed])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["time first", "batch first", "cell"])
def test_results_are_no_views(kind, change, autocast):
    """Where nn.RNN's are none: they may be detached in place, and made without and changed with
    gradients."""
    if kind == "cell":
        modules = cells(3, 5)
        x = torch.randn(2, 3)
    else:
        modules = pair(3, 5, batch_first=kind == "batch first")
        x = torch.randn(4, 2, 3)
    for module in modules:
        change(module)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results = module(x)
            with torch.no_grad():
                untracked = module(x)
        for result in [results] if kind == "cell" else results:
            assert result.requires_grad
            result.detach_()
            assert not result.requires_grad
        for result in [untracked] if kind == "cell" else untracked:
            result.add_(torch.ones((), requires_grad=True))
            assert result.requires_grad


def test_subclass():
    """A subclass may override forward and call ours by super()."""

    class Residual(charrnn_fast.RNN):
        def forward(self, input, hx=None):
            output, h_n = super().forward(input, hx)
            return output + input, h_n

    rnn = Residual(4, 4)
    x = torch.randn(3, 2, 4)
    plain = charrnn_fast.RNN(4, 4)
    plain.load_state_dict(rnn.state_dict())
    assert torch.equal(rnn(x)[0], plain(x)[0] + x)


HOOKS = [
    "_update_flat_weights",
    "check_forward_args",
    "check_hidden_size",
    "check_input",
    "get_expected_hidden_size",
    "permute_hidden",
]


def watching(cls, names, calls):
    """A subclass whose methods of these names note their arguments, and then do what they did."""

    def watch(name):
        def method(self, *args):
            shapes = [tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in args]
            calls.append((name, shapes))
            return getattr(super(Watching, self), name)(*args)

        return method

    Watching = type("Watching", (cls,), {name: watch(name) for name in names})
    return Watching


INPUTS = {
    "batch": lambda m: m(torch.ones(4, 2, 3)),
    "batch with hx": lambda m: m(torch.ones(4, 2, 3), torch.ones(2, 2, 5)),
    "one sequence": lambda m: m(torch.ones(4, 3)),
    "packed": lambda m: m(pack_sequence([torch.ones(2, 3), torch.ones(4, 3)], False)),
    "packed with hx": lambda m: m(
        pack_sequence([torch.ones(2, 3), torch.ones(4, 3)], False), torch.ones(2, 2, 5)
    ),
    "wrong input": lambda m: m(torch.ones(4, 2, 7)),
    "wrong hx": lambda m: m(torch.ones(4, 2, 3), torch.ones(2, 3, 5)),
}


@pytest.mark.parametrize("hooks", [*([name] for name in HOOKS), HOOKS], ids=",".join)
@pytest.mark.parametrize("call", INPUTS)
def test_overridden_checks_are_asked(hooks, call):
    """What nn.RNN's forward asks of itself, and a subclass overrides, is asked of it as there."""
    seen = []
    for cls in (nn.RNN, charrnn_fast.RNN):
        torch.manual_seed(0)
        calls = []
        module = watching(cls, hooks, calls)(3, 5, 2)
        calls.clear()  # those of the constructor
        try:
            result = INPUTS[call](module)
        except RuntimeError as error:
            calls.append(("raised", str(error)))
        else:
            assert "wrong" not in call
            torch.testing.assert_close(result[1], seen[0][1] if seen else result[1])
        seen.append((calls, None if "wrong" in call else result[1]))
    assert seen[0][0] == seen[1][0]


@pytest.mark.parametrize("name", HOOKS)
def test_checks_overridden_in_one_instance(name):
    """An attribute of the instance in place of a method is asked, too."""

    class Asked(Exception):
        pass

    def ask(*args):
        raise Asked

    rnn = charrnn_fast.RNN(3, 5)
    setattr(rnn, name, ask)
    with pytest.raises(Asked):
        rnn(torch.ones(4, 2, 3))


def test_a_looser_check_of_sizes_holds():
    """What the override lets pass reaches the computation, which has its own error."""

    class Loose(charrnn_fast.RNN):
        def check_input(self, input, batch_sizes):
            pass

    rnn = Loose(3, 5)
    assert rnn(torch.ones(4, 2, 3))[0].shape == (4, 2, 5)
    with pytest.raises(RuntimeError):
        rnn(torch.ones(4, 2, 7))


def test_hooks_run():
    """Forward hooks, pre-hooks and full backward hooks see what nn.RNN's see."""
    seen = []
    for module in pair(3, 5):
        calls = []
        module.register_forward_pre_hook(lambda m, a, c=calls: c.append(len(a)))
        module.register_forward_hook(lambda m, a, o, c=calls: c.append(o[0].shape))
        module.register_full_backward_hook(lambda m, gi, go, c=calls: c.append(go[0].shape))
        module(torch.randn(4, 2, 3, requires_grad=True))[0].sum().backward()
        seen.append(calls)
    assert seen[0] == seen[1]
    assert len(seen[0]) == 3


def forward_of(module, calls):
    def forward(*args):
        calls.append(args)
        return type(module).forward(module, *args)

    return forward


def set_forward(module, calls, patch):
    module.forward = forward_of(module, calls)


def set_compiled(module, calls, patch):
    module._compiled_call_impl = forward_of(module, calls)


def set_call_impl(module, calls, patch):
    module._call_impl = forward_of(module, calls)


def set_class_forward(module, calls, patch):
    forward = type(module).forward
    patch.setattr(type(module), "forward", lambda m, *a: calls.append(a) or forward(m, *a))


def set_module_call(module, calls, patch):
    call = nn.Module.__call__
    patch.setattr(nn.Module, "__call__", lambda m, *a: calls.append(a) or call(m, *a))


def set_stock_call(module, calls, patch):
    call = nn.Module.__call__
    patch.setattr(nn.RNN, "__call__", lambda m, *a: calls.append(a) or call(m, *a), raising=False)


def set_module_call_impl(module, calls, patch):
    call = nn.Module._call_impl
    patch.setattr(nn.Module, "_call_impl", lambda m, *a: calls.append(a) or call(m, *a))


def set_global_hook(register):
    def set_hook(module, calls, patch):
        hook = register(lambda m, *a: calls.append(a))
        patch.callback(hook.remove)

    return set_hook


def set_own_hook(name):
    def set_hook(module, calls, patch):
        getattr(module, name)(lambda m, *a: calls.append(a))

    return set_hook


BYSTANDERS = {
    "forward of the instance": set_forward,
    "compiled": set_compiled,
    "call_impl of the instance": set_call_impl,
    "forward of the class": set_class_forward,
    "nn.Module.__call__": set_module_call,
    "nn.RNN.__call__": set_stock_call,
    "nn.Module._call_impl": set_module_call_impl,
    "forward hook": set_own_hook("register_forward_hook"),
    "pre-hook": set_own_hook("register_forward_pre_hook"),
    "backward hook": set_own_hook("register_full_backward_hook"),
    "backward pre-hook": set_own_hook("register_full_backward_pre_hook"),
    "global hook": set_global_hook(nn.modules.module.register_module_forward_hook),
    "global pre-hook": set_global_hook(nn.modules.module.register_module_forward_pre_hook),
    "global backward hook": set_global_hook(nn.modules.module.register_module_full_backward_hook),
    "global backward pre-hook": set_global_hook(
        nn.modules.module.register_module_full_backward_pre_hook
    ),
}


class Patch(pytest.MonkeyPatch):
    """Undoes calls, too."""

    def __init__(self, stack):
        super().__init__()
        self.callback = stack.callback
        stack.callback(self.undo)


@pytest.mark.parametrize("name", BYSTANDERS)
def test_who_stands_between_call_and_forward_is_asked(name):
    """What is put there after a first call is asked by the second one, as by nn.RNN."""
    counts = []
    for module in pair(3, 5):
        x, calls = torch.ones(4, 2, 3, requires_grad=True), []
        module(x)
        with contextlib.ExitStack() as stack:
            BYSTANDERS[name](module, calls, Patch(stack))
            module(x)[0].sum().backward()
        counts.append(len(calls))
    assert counts == [1, 1]


def test_classes_between_call_and_forward_are_asked():
    """Overrides of a subclass, and those of another base."""
    calls = []

    class Base(nn.Module):
        def __call__(self, *args):
            calls.append("base")
            return super().__call__(*args)

    class Both(charrnn_fast.RNN, Base):
        pass

    class Call(charrnn_fast.RNN):
        def __call__(self, *args):
            calls.append("call")
            return super().__call__(*args)

    class Forward(charrnn_fast.RNN):
        def forward(self, *args):
            calls.append("forward")
            return super().forward(*args)

    for cls in (Both, Call, Forward):
        assert cls(3, 5)(torch.ones(4, 2, 3))[0].shape == (4, 2, 5)
    assert calls == ["base", "call", "forward"]


def test_keywords_and_wrong_calls():
    """Arguments by name mean the same, and errors of a call are those of forward."""
    rnn = charrnn_fast.RNN(3, 5)
    x, hx = torch.randn(4, 2, 3), torch.randn(1, 2, 5)
    for result in (rnn(x, hx=hx), rnn(input=x, hx=hx), rnn(x, hx, None)):
        assert torch.equal(result[0], rnn(x, hx)[0])
    for args in ((), (x, hx, None, None)):
        with pytest.raises(TypeError, match="forward"):
            rnn(*args)


def test_the_profiler_finds_the_module():
    """torch.profiler knows modules by their calls of nn.Module.__call__."""
    stock, ours = pair(3, 5)

    def is_found(rnn):
        x = torch.randn(4, 2, 3)
        rnn(x)
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], with_stack=True
        ) as profile:
            rnn(x)
        return any("nn.Module: RNN" in event.name for event in profile.events())

    if not is_found(stock):
        pytest.skip("the profiler of this torch finds no modules")
    assert is_found(ours)
