"""The commands of ``charrnn-fast``, by name; cli.py parses their arguments."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from .charlm.errors import UsageError


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that flags and the file of --config set; flags win."""
    from .charlm.options import option_names, read_config

    in_file = read_config(arguments.config) if arguments.config else {}
    flags = {name: getattr(arguments, name) for name in option_names() if hasattr(arguments, name)}
    for given in (in_file, flags):
        if "max_epochs" in given and given.get("max_iters"):
            raise UsageError("--max-iters is in place of --max-epochs: give one of them")
    if "max_epochs" in flags:
        in_file.pop("max_iters", None)
    return in_file | flags


def train(arguments: argparse.Namespace) -> None:
    from .charlm.finetune import started_options
    from .charlm.options import resumed_options
    from .charlm.train import Trainer

    given = given_options(arguments)
    if arguments.resume:
        options = resumed_options(arguments.resume, given)
    else:
        options = started_options(given)
    trainer = Trainer(options, resume=arguments.resume is not None, overwrite=arguments.overwrite)
    progress = trainer.run()
    best = "" if trainer.held_out is None else f"; best at step {progress.best_step}"
    trainer.say(f"saved in {options.out_dir}{best}; try: {trainer.home.command('sample')}")
    trainer.leave_group()


def sample(arguments: argparse.Namespace) -> None:
    from .charlm.checkpoint import from_pretrained
    from .charlm.checks import whole
    from .charlm.data import read_prompt
    from .charlm.sample import MOST_STREAMS, SampleOptions, sample, stream, write_stream

    if arguments.greedy and arguments.temperature is not None:
        raise UsageError("--greedy is --temperature 0: give one of them")
    temperature = 1.0 if arguments.temperature is None else arguments.temperature
    options = SampleOptions(
        0.0 if arguments.greedy else temperature, arguments.top_k, arguments.top_p
    )
    whole("--length", arguments.length, 1)
    whole("--num-samples", arguments.num_samples, 1, MOST_STREAMS)
    model, vocabulary, _ = from_pretrained(
        arguments.run, arguments.backend, arguments.device, arguments.last
    )
    prompt, stop = as_utf8(arguments.start), as_utf8(arguments.stop)
    if prompt.startswith("FILE:"):
        prompt = read_prompt(prompt.removeprefix("FILE:"), vocabulary)
    if arguments.on_unknown != "error":  # what is shown is what the model reads
        prompt = vocabulary.decode(vocabulary.encode(prompt, arguments.on_unknown))
    if arguments.num_samples == 1 and not arguments.output:
        pieces = stream(
            model, vocabulary, prompt, arguments.length, options,
            seed=arguments.seed, on_unknown=arguments.on_unknown,
            chunk=32 if sys.stdout.isatty() else 1024,
        )  # fmt: skip
        first = next(pieces)  # an unknown character is found before anything is printed
        sys.stdout.write(prompt)
        write_stream((p for g in ([first], pieces) for p in g), vocabulary, stop)
        sys.stdout.write("\n")
        return
    texts = sample(
        model, vocabulary, prompt, arguments.length,
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
        seed=arguments.seed, streams=arguments.num_samples, stop=stop,
        on_unknown=arguments.on_unknown,
        errors="surrogateescape" if arguments.output else "replace",
    )  # fmt: skip
    content = ("\n" + "-" * 15 + "\n").join(prompt + text for text in texts) + "\n"
    if arguments.output:
        Path(arguments.output).write_bytes(content.encode("utf-8", "surrogateescape"))
    else:
        sys.stdout.write(content)


def as_utf8(argument: str) -> str:
    """An argument as it was typed, where Python decoded its UTF-8 bytes in an ASCII locale."""
    return os.fsencode(argument).decode("utf-8", "surrogateescape")


def eval(arguments: argparse.Namespace) -> None:
    import numpy as np

    from .charlm.checkpoint import from_pretrained
    from .charlm.data import LineBatches, encode_file, held_out_part, line_break
    from .charlm.evaluate import TOO_SHORT, evaluate_lines, evaluate_stream
    from .charlm.model import bits, perplexity
    from .charlm.options import saved_options

    if arguments.text is None and arguments.on_unknown != "error":
        raise UsageError("--on-unknown is for another text: what was held out is known")
    model, vocabulary, training = from_pretrained(
        arguments.run, arguments.backend, arguments.device, arguments.last
    )
    name, part = "held out", None
    if arguments.text is None:
        part = held_out_part(training, vocabulary)
        pieces = iter(()) if isinstance(part, LineBatches) else iter((part,))
    else:
        name = arguments.text
        pieces = encode_file(arguments.text, vocabulary, arguments.on_unknown)
        if training and saved_options(training).lines:
            ids = np.concatenate([np.empty(0, vocabulary.dtype), *pieces])
            try:
                part = LineBatches(ids, 64, line_break(vocabulary), 0)
            except UsageError as error:
                raise UsageError(f"{name}: {error}") from None
    start = time.perf_counter()
    if isinstance(part, LineBatches):
        loss, count = evaluate_lines(model, part)
    else:
        loss, count = evaluate_stream(model, pieces)
    if not count:
        raise UsageError(f"{name}: {TOO_SHORT}")
    print(
        f"{name}: {loss:.4f} nats, {bits(loss):.4f} bits/character, "
        f"perplexity {perplexity(loss):.3f} "
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
    from .charlm.checks import real
    from .charlm.options import TrainOptions

    real("--seconds", arguments.seconds, open=True)
    if getattr(arguments, "threads", 0) is False:  # given without a number
        print_scaling(arguments.seconds)
        return
    options = replace(TrainOptions(), **given_options(arguments))
    rows = bench(options, arguments.seconds)
    print(
        f"{options.model_config(1).describe()}, batch {options.batch_size}, "
        f"sequences of {options.seq_length}, {torch.get_num_threads()} threads; characters/s"
    )
    reference = f"torch.nn.{options.cell.upper()}"
    print(f"{'':24} {'charrnn_fast':>14} {reference:>14} {'ratio':>7}")
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
    from .charlm.checks import whole
    from .charlm.demo import demo

    whole("--max-epochs", arguments.max_epochs, 1)
    whole("--max-iters", arguments.max_iters)
    demo(arguments.out_dir, arguments.max_epochs, arguments.max_iters, arguments.cell)
