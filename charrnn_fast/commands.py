"""What the commands of ``charrnn-fast`` do, by name; cli.py reads their arguments."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import fields, replace
from math import exp
from pathlib import Path
from typing import Any

from .charlm.errors import UsageError


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the flags and the file of --config say; flags win."""
    from .charlm.options import TrainOptions, read_config

    given = read_config(arguments.config) if arguments.config else {}
    return given | {f.name: getattr(arguments, f.name) for f in fields(TrainOptions)
                    if hasattr(arguments, f.name)}  # fmt: skip


def train(arguments: argparse.Namespace) -> None:
    from .charlm.options import TrainOptions, resumed_options
    from .charlm.train import Trainer

    given = given_options(arguments)
    if arguments.resume:
        options = resumed_options(arguments.resume, given)
    else:
        options = replace(TrainOptions(), **given)
    trainer = Trainer(options, resume=bool(arguments.resume), overwrite=arguments.overwrite)
    trainer.say(
        f"{sum(p.numel() for p in trainer.model.parameters()):,} weights, "
        f"{len(trainer.vocabulary)} characters, {trainer.total_steps} steps"
    )
    progress = trainer.run()
    trainer.say(f"saved in {options.out_dir}; best at step {progress.best_step}; "
                f"try: charrnn-fast sample {options.out_dir}")  # fmt: skip
    trainer.leave_group()


def sample(arguments: argparse.Namespace) -> None:
    from .charlm.checkpoint import from_pretrained
    from .charlm.data import read_prompt
    from .charlm.sample import SampleOptions, sample, stream, write_stream

    options = SampleOptions(
        0.0 if arguments.greedy else arguments.temperature, arguments.top_k, arguments.top_p
    )
    if arguments.length < 1 or arguments.num_samples < 1:
        raise UsageError("--length and --num-samples must be at least 1")
    model, vocabulary, _ = from_pretrained(
        arguments.run, arguments.backend, arguments.device, arguments.last
    )
    prompt = arguments.start
    if prompt.startswith("FILE:"):
        prompt = read_prompt(prompt.removeprefix("FILE:"), vocabulary)
    if arguments.num_samples == 1 and not arguments.output:
        pieces = stream(
            model, vocabulary, prompt, arguments.length, options,
            seed=arguments.seed, on_unknown=arguments.on_unknown,
            chunk=32 if sys.stdout.isatty() else 1024,
        )  # fmt: skip
        first = next(pieces)  # an unknown character is found before anything is printed
        sys.stdout.write(prompt)
        write_stream((p for g in ([first], pieces) for p in g), vocabulary, arguments.stop)
        sys.stdout.write("\n")
        return
    texts = sample(
        model, vocabulary, prompt, arguments.length,
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
        seed=arguments.seed, streams=arguments.num_samples, stop=arguments.stop,
        on_unknown=arguments.on_unknown,
        errors="surrogateescape" if arguments.output else "replace",
    )  # fmt: skip
    content = ("\n" + "-" * 15 + "\n").join(prompt + text for text in texts) + "\n"
    if arguments.output:
        Path(arguments.output).write_bytes(content.encode("utf-8", "surrogateescape"))
    else:
        sys.stdout.write(content)


def eval(arguments: argparse.Namespace) -> None:
    import numpy as np

    from .charlm.checkpoint import from_pretrained
    from .charlm.data import LineBatches, encode_file, held_out_part
    from .charlm.evaluate import evaluate_lines, evaluate_stream
    from .charlm.model import bits
    from .charlm.options import saved_options

    model, vocabulary, training = from_pretrained(
        arguments.run, arguments.backend, arguments.device, arguments.last
    )
    name, part = "held out", None
    if arguments.text is None:
        part = held_out_part(training)
        pieces = iter(()) if isinstance(part, LineBatches) else iter((part,))
    else:
        name = arguments.text
        pieces = encode_file(arguments.text, vocabulary, arguments.on_unknown)
        if training and saved_options(training).lines:
            ids = np.concatenate([*pieces])
            part = LineBatches(ids, 64, vocabulary.characters.index("\n"), 0)
    start = time.perf_counter()
    if isinstance(part, LineBatches):
        loss, count = evaluate_lines(model, part)
    else:
        loss, count = evaluate_stream(model, pieces)
    if not count:
        raise UsageError(f"{name}: two characters are the least there is to predict")
    print(
        f"{name}: {loss:.4f} nats, {bits(loss):.4f} bits/character, perplexity {exp(loss):.3f} "
        f"({count:,} characters, {count / (time.perf_counter() - start):,.0f} a second)"
    )


def report(arguments: argparse.Namespace) -> None:
    from .charlm.report import write_report

    print(f"wrote {write_report(arguments.run, arguments.output, arguments.backend)}")


def export(arguments: argparse.Namespace) -> None:
    from .charlm.checkpoint import from_pretrained
    from .charlm.export import difference_in_onnxruntime, export_onnx

    model, vocabulary, _ = from_pretrained(arguments.run, "torch", last=arguments.last)
    path = arguments.output or str(Path(arguments.run) / "model.onnx")
    export_onnx(model, vocabulary, path)
    try:
        difference = difference_in_onnxruntime(model, path)
    except ImportError:
        print(f"wrote {path}; not tried: onnxruntime is not installed")
    else:
        print(f"wrote {path}; scores in ONNX Runtime differ by {difference:.1e} at most")


def bench(arguments: argparse.Namespace) -> None:
    import torch

    from .charlm.bench import bench
    from .charlm.options import TrainOptions

    if not arguments.seconds > 0:
        raise UsageError("--seconds must be positive")
    if getattr(arguments, "threads", 0) is False:  # given without a number
        print_scaling(arguments.seconds)
        return
    options = replace(TrainOptions(), **given_options(arguments))
    rows = bench(options, arguments.seconds)
    print(
        f"{options.num_layers} x {options.hidden_size}, batch {options.batch_size}, "
        f"sequences of {options.seq_length}, {torch.get_num_threads()} threads; characters/s"
    )
    print(f"{'':24} {'charrnn_fast':>14} {'torch.nn.RNN':>14} {'ratio':>7}")
    for row in rows:
        print(f"{row.task:24} {row.fast:14,.0f} {row.torch:14,.0f} {row.fast / row.torch:7.2f}")


def print_scaling(seconds: float) -> None:
    import torch

    from .scaling import machine, measure, table

    print(machine())
    rows = []
    for row in measure(seconds / 10, torch.get_num_threads()):
        rows.append(row)
        if sys.stderr.isatty():
            print(f"\r{row.cell} {row.size} {row.threads} threads   ", end="", file=sys.stderr)
    print(table(rows))


def info(arguments: argparse.Namespace) -> None:
    import torch

    import charrnn_fast

    from ._extension import cuda_choice

    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "no"
    kernels = torch._C._dispatch_has_kernel_for_dispatch_key("charrnn_fast::rnn_layer", "CUDA")
    rows = {
        "charrnn_fast": charrnn_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cuda": cuda,
        "CUDA kernels": ("" if kernels else "not ") + f"in this build: {cuda_choice()}",
        "instruction sets": ", ".join(charrnn_fast.available_isas()),
        "in use": charrnn_fast.current_isa(),
        "build": json.dumps(charrnn_fast.build_info()),
    }
    for name, value in rows.items():
        print(f"{name:17} {value}")


def demo(arguments: argparse.Namespace) -> None:
    from .charlm.demo import demo

    demo(arguments.out_dir, arguments.max_epochs, arguments.max_iters)
