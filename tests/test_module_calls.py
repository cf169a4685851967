"""Overrides, hooks and patches between a call and the computation: asked as by torch.nn."""

import contextlib

import pytest
import torch
from kinds import flat
from torch import nn
from torch.nn.utils.rnn import pack_sequence

HOOKS = [
    "_update_flat_weights",
    "check_forward_args",
    "get_expected_cell_size",  # of an LSTM
    "check_hidden_size",
    "check_input",
    "get_expected_hidden_size",
    "permute_hidden",
]


def watching(cls, names, calls):
    """A subclass whose methods of these names note their arguments, and then do what they did."""

    def watch(name):
        def method(self, *args):
            calls.append((name, shapes_of(args)))
            return getattr(super(Watching, self), name)(*args)

        return method

    Watching = type("Watching", (cls,), {name: watch(name) for name in names})
    return Watching


INPUTS = {
    "batch": lambda m, state: m(torch.ones(4, 2, 3)),
    "batch with hx": lambda m, state: m(torch.ones(4, 2, 3), state(2, 2, 5)),
    "one sequence": lambda m, state: m(torch.ones(4, 3)),
    "packed": lambda m, state: m(pack_sequence([torch.ones(2, 3), torch.ones(4, 3)], False)),
    "packed with hx": lambda m, state: m(
        pack_sequence([torch.ones(2, 3), torch.ones(4, 3)], False), state(2, 2, 5)
    ),
    "wrong input": lambda m, state: m(torch.ones(4, 2, 7)),
    "wrong hx": lambda m, state: m(torch.ones(4, 2, 3), state(2, 3, 5)),
}


def shapes_of(value):
    if isinstance(value, (tuple, list)):
        return [shapes_of(part) for part in value]
    return tuple(value.shape) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("hooks", [*([name] for name in HOOKS), HOOKS], ids=",".join)
@pytest.mark.parametrize("call", INPUTS)
def test_overridden_checks_are_asked(kind, hooks, call):
    """What torch.nn's forward asks of itself, and a subclass overrides, is asked of it as there."""
    seen = []
    hooks = [name for name in hooks if hasattr(kind.stock, name)]
    for cls in (kind.stock, kind.ours):
        torch.manual_seed(0)
        calls = []
        module = watching(cls, hooks, calls)(3, 5, 2)
        calls.clear()  # those of the constructor
        states = None
        try:
            result = INPUTS[call](module, lambda *shape: kind.state(*shape, make=torch.ones))
        except RuntimeError as error:
            calls.append(("raised", str(error)))
        else:
            assert "wrong" not in call
            states = flat(result[1])
            torch.testing.assert_close(states, seen[0][1] if seen else states)
        seen.append((calls, states))
    assert seen[0][0] == seen[1][0]


@pytest.mark.parametrize("name", HOOKS)
def test_checks_overridden_in_one_instance(kind, name):
    """An attribute of the instance in place of a method is asked, too."""
    if not hasattr(kind.stock, name):
        pytest.skip(f"{kind} has no {name}")

    class Asked(Exception):
        pass

    def ask(*args):
        raise Asked

    rnn = kind.ours(3, 5)
    setattr(rnn, name, ask)
    with pytest.raises(Asked):
        rnn(torch.ones(4, 2, 3))


def test_a_looser_check_of_sizes_holds(kind):
    """What the override lets pass reaches the computation, which has its own error."""

    class Loose(kind.ours):
        def check_input(self, input, batch_sizes):
            pass

    rnn = Loose(3, 5)
    assert rnn(torch.ones(4, 2, 3))[0].shape == (4, 2, 5)
    with pytest.raises(RuntimeError):
        rnn(torch.ones(4, 2, 7))


def test_hooks_run(kind):
    """Forward hooks, pre-hooks and full backward hooks see what torch.nn's see."""
    seen = []
    for module in kind.pair(3, 5):
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
    stock = type(module).__mro__[1]
    stock = type(module) if stock is nn.RNNBase else stock
    patch.setattr(stock, "__call__", lambda m, *a: calls.append(a) or call(m, *a), raising=False)


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
    "__call__ of torch.nn's class": set_stock_call,
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
def test_who_stands_between_call_and_forward_is_asked(kind, name):
    """What is put there after a first call is asked by the second one, as by torch.nn."""
    counts = []
    for module in kind.pair(3, 5):
        x, calls = torch.ones(4, 2, 3, requires_grad=True), []
        module(x)
        with contextlib.ExitStack() as stack:
            BYSTANDERS[name](module, calls, Patch(stack))
            module(x)[0].sum().backward()
        counts.append(len(calls))
    assert counts == [1, 1]


def test_classes_between_call_and_forward_are_asked(kind):
    """Overrides of a subclass, and those of another base."""
    calls = []

    class Base(nn.Module):
        def __call__(self, *args):
            calls.append("base")
            return super().__call__(*args)

    class Both(kind.ours, Base):
        pass

    class Call(kind.ours):
        def __call__(self, *args):
            calls.append("call")
            return super().__call__(*args)

    class Forward(kind.ours):
        def forward(self, *args):
            calls.append("forward")
            return super().forward(*args)

    for cls in (Both, Call, Forward):
        assert cls(3, 5)(torch.ones(4, 2, 3))[0].shape == (4, 2, 5)
    assert calls == ["base", "call", "forward"]


def test_the_profiler_finds_the_module(kind):
    """torch.profiler knows modules by their calls of nn.Module.__call__."""
    stock, ours = kind.pair(3, 5)

    def is_found(rnn):
        x = torch.randn(4, 2, 3)
        rnn(x)
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], with_stack=True
        ) as profile:
            rnn(x)
        return any(f"nn.Module: {kind}" in event.name for event in profile.events())

    if not is_found(stock):
        pytest.skip("the profiler of this torch finds no modules")
    assert is_found(ours)
