"""The sides of a comparison: our op and our module, nn.RNN, and the peers that are installed.

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
from .common import ALL_CPUS, NAMES, Problem, Side, named


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

    needs = [x_needs_gradient, False, False, *[True] * 4]  # of x, h0, c0 and the weights
    op = native.bound_op().BoundOp(
        problem.x, problem.weights, problem.dy if backward else None, needs
    )
    with torch.no_grad():
        fused(op.run, backward)
    names = NAMES if x_needs_gradient else [name for name in NAMES if name != "dx"]
    return Side("op", op.run, lambda _: named([result.double() for result in op.results()], names))


def of_module(name: str, problem: Problem, backward: bool, cls: type[torch.nn.RNN]) -> Side:
    module = problem.module(cls)
    if not backward:
        return Side(name, lambda: module(problem.x)[:1], named)
    x = problem.x.clone().requires_grad_()
    parameters = list(module.parameters())

    def forward_backward():
        y, _ = module(x)
        return y, *torch.autograd.grad(y, [x, *parameters], problem.dy)

    return Side(name, forward_backward, lambda out: named([out[0].detach(), *out[1:]]), grad=True)


def our_module(problem: Problem, backward: bool) -> Side:
    from charrnn_fast import RNN

    side = of_module("module", problem, backward, RNN)
    with torch.set_grad_enabled(side.grad):
        fused(side.run, backward)
    return side


def torch_rnn(problem: Problem, backward: bool) -> Side:
    return of_module("nn.RNN", problem, backward, torch.nn.RNN)


def jax_scan(problem: Problem, backward: bool) -> Side:
    """lax.scan over tanh(xW + hW), jitted; the input's product is one GEMM before the scan."""
    import jax
    import jax.numpy as jnp

    # A call then runs in the caller's thread: measured twice as fast at small sizes.
    jax.config.update("jax_cpu_enable_async_dispatch", False)

    def rnn(x, W_ih, W_hh, bias):
        W_hh_T = W_hh.T  # once, before the scan: measured faster than in the step

        def step(h, projected):
            h = jnp.tanh(projected + h @ W_hh_T)
            return h, h

        h0 = jnp.zeros((x.shape[1], W_hh.shape[0]), x.dtype)
        return jax.lax.scan(step, h0, x @ W_ih.T + bias)[1]

    @jax.jit
    def forward(*arguments):
        return (rnn(*arguments),)

    @jax.jit
    def forward_backward(dy, *arguments):
        y, gradients = jax.vjp(rnn, *arguments)
        return y, *gradients(dy)

    W_ih, W_hh, b_ih, b_hh = problem.weights
    arguments = [jnp.asarray(a.numpy()) for a in (problem.x, W_ih, W_hh, b_ih + b_hh)]
    if backward:
        arguments.insert(0, jnp.asarray(problem.dy.numpy()))
    compiled = (forward_backward if backward else forward).lower(*arguments).compile()
    return Side("JAX", lambda: jax.block_until_ready(compiled(*arguments)), named)


def onnx_runtime(problem: Problem, backward: bool) -> Side | None:
    """The ONNX RNN operator; inputs and outputs are bound once."""
    if backward:
        return None
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    B, T, I, H = problem.shape
    W_ih, W_hh, b_ih, b_hh = (w.numpy() for w in problem.weights)
    constants = {"W": W_ih[None], "R": W_hh[None], "bias": np.concatenate([b_ih, b_hh])[None]}
    graph = helper.make_graph(
        [helper.make_node("RNN", ["x", *constants], ["y"], hidden_size=H, activations=["Tanh"])],
        "rnn",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [T, B, I])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [T, 1, B, H])],
        [numpy_helper.from_array(np.ascontiguousarray(a), name) for name, a in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    x, y = problem.x.numpy(), np.empty((T, 1, B, H), np.float32)
    binding = session.io_binding()
    binding.bind_input("x", "cpu", 0, np.float32, x.shape, x.ctypes.data)
    binding.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)
    return Side("ONNX Runtime", lambda: session.run_with_iobinding(binding), lambda _: named([y]))


def onednn(problem: Problem, backward: bool, threads: int = 1) -> Side:
    """oneDNN's vanilla RNN primitives, created once."""
    library = native.onednn()
    B, T, I, H = problem.shape
    W_ih, W_hh, b_ih, b_hh = problem.weights
    arrays = [a.numpy() for a in (problem.x, W_ih, W_hh, b_ih + b_hh, problem.dy)]
    rnn = library.rnn_create(threads, T, B, I, H, backward, *(a.ctypes.data for a in arrays))
    if not rnn:
        raise ImportError(library.rnn_error().decode())
    handle = ctypes.c_void_p(rnn)

    def results(_):
        sizes = [(T, B, H), (T, B, I), (H, I), (H, H), (H,)]
        out = [np.empty(size, np.float32) for size in sizes]
        library.rnn_read(handle, *(a.ctypes.data for a in out))
        return named(out if backward else out[:1])

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


PEERS = {"nn.RNN": torch_rnn, "JAX": jax_scan, "ONNX Runtime": onnx_runtime, "oneDNN": onednn}


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
