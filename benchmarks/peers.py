"""The sides of a comparison: our op and module, torch's module, and the peers that are installed.

Each function takes a problem and whether backward is wanted, and returns a Side, or None where the
peer has no such thing; it raises ImportError where the peer is not installed. What a side may do
before it is timed: compile, and lay out the weights as it likes best.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import weakref

import numpy as np
import torch

from . import native
from .common import ALL_CPUS, Problem, Side


def counted(run, *counters: str):
    """Runs once and asserts that the fused kernels did the work; returns run unchanged."""
    from charrnn_fast import _C

    before = _C.counters()
    run()
    after = _C.counters()
    changed = {key for key in after if after[key] != before.get(key, 0)}
    assert changed == set(counters), f"expected the path {counters}, saw {sorted(changed)}"
    return run


def fused(run, backward: bool):
    return counted(run, "forward_fused", *(["backward_fused"] if backward else []))


def our_op(problem: Problem, backward: bool, x_needs_gradient: bool = True) -> Side:
    """Our ops rnn_layer and rnn_layer_backward without autograd, their arguments bound once."""
    import charrnn_fast  # noqa: F401

    has_c = len(problem.states) > 1
    op = native.bound_op().BoundOp(
        problem.kind.mode,
        problem.x,
        problem.states[0],
        problem.states[1] if has_c else None,
        problem.weights,
        problem.lengths,
        problem.dy if backward else None,
        [x_needs_gradient, True, has_c, *[True] * len(problem.weights)],
    )
    with torch.no_grad():
        fused(op.run, backward)
    names = [name for name in problem.names if x_needs_gradient or name != "dx"]
    return Side(
        "op", op.run, lambda _: problem.named([result.double() for result in op.results()], names)
    )


def of_module(name: str, problem: Problem, backward: bool, cls: type[torch.nn.RNNBase]) -> Side:
    module = problem.module(cls)
    if not backward:
        hx = problem.as_hx(problem.states)
        return Side(name, lambda: module(problem.x, hx)[:1], problem.named)
    inputs = [tensor.clone().requires_grad_() for tensor in (problem.x, *problem.states)]
    hx = problem.as_hx(inputs[1:])
    wanted = [*inputs, *module.parameters()]

    def forward_backward():
        y, _ = module(inputs[0], hx)
        return y, *torch.autograd.grad(y, wanted, problem.dy)

    return Side(
        name, forward_backward, lambda out: problem.named([out[0].detach(), *out[1:]]), grad=True
    )


def our_module(problem: Problem, backward: bool) -> Side:
    import charrnn_fast

    side = of_module("module", problem, backward, getattr(charrnn_fast, problem.cell))
    with torch.set_grad_enabled(side.grad):
        fused(side.run, backward)
    return side


def torch_module(problem: Problem, backward: bool) -> Side:
    return of_module(problem.torch_name, problem, backward, getattr(torch.nn, problem.cell))


def jax_layers():
    """One layer of each cell, f(x, states, W_ih, W_hh, b_ih, b_hh) -> y, as JAX runs it fastest.

    The input's product is one GEMM before the scan, and W_hh is transposed there. XLA fuses nothing
    into a product, so what follows it should be few loops: an LSTM takes one tanh over all gates,
    sigmoid(x) being (1 + tanh(x/2)) / 2; a GRU, whose last gate cannot join, a product a gate.
    """
    import jax
    import jax.numpy as jnp

    def rnn(x, states, W_ih, W_hh, b_ih, b_hh):
        W_hh_T = W_hh.T

        def step(h, projected):
            h = jnp.tanh(projected + h @ W_hh_T)
            return h, h

        return jax.lax.scan(step, states[0], x @ W_ih.T + (b_ih + b_hh))[1]

    def lstm(x, states, W_ih, W_hh, b_ih, b_hh):
        W_hh_T = W_hh.T
        scale = jnp.repeat(jnp.asarray([0.5, 0.5, 1.0, 0.5], x.dtype), W_hh.shape[1])

        def step(state, projected):
            h, c = state
            gates = jnp.tanh((projected + h @ W_hh_T) * scale) * scale + (1 - scale)
            i, f, g, o = jnp.split(gates, 4, axis=-1)
            c = f * c + i * g
            h = o * jnp.tanh(c)
            return (h, c), h

        return jax.lax.scan(step, tuple(states), x @ W_ih.T + (b_ih + b_hh))[1]

    def gru(x, states, W_ih, W_hh, b_ih, b_hh):
        W_hr, W_hz, W_hn = (W.T for W in jnp.split(W_hh, 3))
        b_hr, b_hz, b_hn = jnp.split(b_hh, 3)

        def sigmoid(a):
            return 0.5 * jnp.tanh(0.5 * a) + 0.5

        def step(h, projected):
            x_r, x_z, x_n = projected
            r = sigmoid(x_r + h @ W_hr)
            z = sigmoid(x_z + h @ W_hz)
            n = jnp.tanh(x_n + r * (h @ W_hn + b_hn))
            h = n + z * (h - n)
            return h, h

        bias = b_ih + jnp.concatenate([b_hr, b_hz, jnp.zeros_like(b_hn)])
        projected = jnp.split(x @ W_ih.T + bias, 3, axis=-1)
        return jax.lax.scan(step, states[0], projected)[1]

    return {"RNN": rnn, "LSTM": lstm, "GRU": gru}


def jax_scan(problem: Problem, backward: bool) -> Side:
    """lax.scan over a step, jitted and compiled beforehand."""
    import jax
    import jax.numpy as jnp

    # A call then runs in the caller's thread: measured twice as fast at small sizes.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    layer = jax_layers()[problem.cell]

    @jax.jit
    def forward(*arguments):
        return (layer(*arguments),)

    @jax.jit
    def forward_backward(dy, *arguments):
        y, gradients = jax.vjp(layer, *arguments)
        return y, *gradients(dy)

    states = [jnp.asarray(state[0].numpy()) for state in problem.states]
    x, *weights = (jnp.asarray(a.numpy()) for a in (problem.x, *problem.weights))
    arguments = [x, states, *weights]
    if backward:
        arguments.insert(0, jnp.asarray(problem.dy.numpy()))
    compiled = (forward_backward if backward else forward).lower(*arguments).compile()

    def results(out):
        return problem.named(jax.tree.leaves(out))

    return Side("JAX", lambda: jax.block_until_ready(compiled(*arguments)), results)


# Torch's gates in the order of ONNX: i o f c; z r h.
ONNX_GATES = {"RNN": [0], "LSTM": [0, 3, 1, 2], "GRU": [1, 0, 2]}
ONNX_ATTRIBUTES = {
    "RNN": {"activations": ["Tanh"]},
    "LSTM": {},
    "GRU": {"linear_before_reset": 1},
}


def in_gates(weight: torch.Tensor, order: list[int]) -> np.ndarray:
    """A weight or bias with its gates in another order."""
    gates = weight.numpy().reshape(len(order), -1, *weight.shape[1:])
    return np.ascontiguousarray(gates[order].reshape(weight.shape))


def onnx_runtime(problem: Problem, backward: bool) -> Side | None:
    """The ONNX operator of the cell; inputs and outputs are bound once."""
    if backward:
        return None
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    B, T, _, H = problem.shape
    order = ONNX_GATES[problem.cell]
    W_ih, W_hh, b_ih, b_hh = (in_gates(weight, order) for weight in problem.weights)
    constants = {"W": W_ih[None], "R": W_hh[None], "bias": np.concatenate([b_ih, b_hh])[None]}
    states = {f"{name}0": s.numpy() for name, s in zip("hc", problem.states, strict=False)}
    inputs = {"x": problem.x.numpy(), **states}
    node = helper.make_node(
        problem.cell,
        ["x", *constants, "", *states],  # "": all sequences have T steps
        ["y"],
        hidden_size=H,
        **ONNX_ATTRIBUTES[problem.cell],
    )
    graph = helper.make_graph(
        [node],
        "layer",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape)
            for name, array in inputs.items()
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [T, 1, B, H])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    y = np.empty((T, 1, B, H), np.float32)
    binding = session.io_binding()
    for name, array in inputs.items():  # of the problem, which outlives the binding
        binding.bind_input(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
    binding.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)
    return Side(
        "ONNX Runtime",
        lambda: session.run_with_iobinding(binding),
        lambda _: problem.named([y]),
    )


def onednn(problem: Problem, backward: bool) -> Side:
    """oneDNN's primitive of the cell, created once; `lbr_gru` is torch's GRU."""
    library = native.onednn()
    B, T, I, H = problem.shape
    gru, G = problem.cell == "GRU", problem.kind.gates
    order = [1, 0, 2] if gru else list(range(G))  # z r n; i f g o are as torch's
    W_ih, W_hh, b_ih, b_hh = (in_gates(weight, order) for weight in problem.weights)
    # One bias for both products, but for the last gate of a GRU, which has two.
    bias = b_ih + b_hh
    if gru:
        bias = np.concatenate([bias[: 2 * H], b_ih[2 * H :], b_hh[2 * H :]])
    states = [state.numpy() for state in problem.states]
    missing = [None] * (2 - len(states))
    arrays = [problem.x.numpy(), *states, *missing, W_ih, W_hh, bias, problem.dy.numpy()]
    rnn = library.rnn_create(
        problem.cell.encode(),
        *(T, B, I, H),
        backward,
        *(array if array is None else array.ctypes.data for array in arrays),
    )
    if not rnn:
        raise ImportError(library.rnn_error().decode())
    handle = ctypes.c_void_p(rnn)

    def results(_):
        y, dx = np.empty(problem.dy.shape, np.float32), np.empty(problem.x.shape, np.float32)
        of_states = [np.empty_like(state) for state in states]
        of_weights = [np.empty_like(array) for array in (W_ih, W_hh, bias)]
        arrays = [y, dx, *of_states, *missing, *of_weights]
        library.rnn_read(handle, *(a if a is None else a.ctypes.data for a in arrays))
        if not backward:
            return problem.named([y])
        dW_ih, dW_hh, db = of_weights
        db_hh = np.concatenate([db[: 2 * H], db[3 * H :]]) if gru else db
        weights = [
            in_gates(torch.from_numpy(value), order)  # which exchanges z and r again
            for value in (dW_ih, dW_hh, db[: G * H], db_hh)
        ]
        return problem.named([y, dx, *of_states, *weights])

    side = Side("oneDNN", lambda: library.rnn_run(handle), results)
    weakref.finalize(side, library.rnn_destroy, handle)
    return side


def fma_peak() -> Side:
    """A register-only FMA loop of about 0.2 ms: the roof, timed with the others."""
    library = native.machine()
    rounds = 65_536
    flops = library.fma_loop(rounds)
    return Side("FMA peak", lambda: library.fma_loop(rounds), info={"flops": flops})


def fma_of_threads(threads: int) -> Side:
    """The same of 9 ms, divided evenly: what a second core adds at best at this moment."""
    library = native.machine()
    rounds = 2_621_440

    def run():
        if threads == 1:
            return library.fma_loop(rounds)
        return library.fma_loop_on_two(ALL_CPUS[0], ALL_CPUS[-1], rounds)

    return Side(f"FMA, {threads} threads", run)


PEERS = {"torch": torch_module, "JAX": jax_scan, "ONNX Runtime": onnx_runtime, "oneDNN": onednn}


def versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "jax", "onnxruntime", "onnx", "onednn-devel-cpu-gomp", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "onednn-devel-cpu-gomp" in found:
        with contextlib.suppress(ImportError):
            found["oneDNN"] = native.onednn().rnn_version().decode()
        del found["onednn-devel-cpu-gomp"]
    return found
