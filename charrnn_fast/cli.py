"""The command ``charrnn-fast``."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NoReturn, get_args

from . import commands
from .charlm.errors import TrainingDiverged, UsageError

EXAMPLES = """\
examples:
  charrnn-fast demo                                 everything at once, in about two minutes
  charrnn-fast train                                learn from the text that comes with Python
  charrnn-fast train my.txt --out-dir runs/mine     learn from a file of yours
  charrnn-fast train --resume runs/mine             go on after Ctrl-C or a crash
  charrnn-fast sample runs/mine --start "Once" --temperature 0.8
  charrnn-fast eval runs/mine other.txt             how well it predicts a text
  charrnn-fast report runs/mine                     curves, samples and surprises in one page
  charrnn-fast export runs/mine                     an ONNX model that steps through a text
  charrnn-fast bench --hidden-size 512              how fast, beside torch.nn
"""
TRAIN_EXAMPLES = """\
examples:
  charrnn-fast train my.txt                                       2 layers of 128, in out/
  charrnn-fast train my.txt --hidden-size 512 --num-layers 1 --learning-rate 1e-3
  charrnn-fast train my.txt --cell lstm --dropout 0.2              rnn, lstm or gru
  charrnn-fast train poems.txt --init-from out --out-dir poems     go on with what out has learnt
  charrnn-fast train names.txt --lines                            every line is an example
  charrnn-fast train program.bin --bytes                          any file
  charrnn-fast train --config run.toml --max-epochs 30            flags win over the file
  charrnn-fast train --resume out --max-epochs 30                 longer than first planned
  torchrun --nproc-per-node=2 -m charrnn_fast train my.txt        two processes
Underscores serve as well as hyphens: --batch_size is --batch-size.
"""
SAMPLE_EXAMPLES = """\
examples:
  charrnn-fast sample out --start "To be" --length 500
  charrnn-fast sample out --temperature 0.7 --top-k 10 --seed 1   less wild, and the same again
  charrnn-fast sample out --greedy --stop "."                     the best guess, one sentence
  charrnn-fast sample out --start FILE:prompt.txt --num-samples 3 -o samples.txt
"""
EVAL_EXAMPLES = """\
examples:
  charrnn-fast eval out                          what the training held out of its text
  charrnn-fast eval out other.txt                another text, of any length, in little memory
  charrnn-fast eval out other.txt --on-unknown replace
"""
BENCH_EXAMPLES = """\
examples:
  charrnn-fast bench                             2 layers of 128, the text that comes with Python
  charrnn-fast bench my.txt --hidden-size 512 --num-layers 1 --threads 1
  charrnn-fast bench --threads                   how calls scale with threads on this machine
Any option of train that concerns the model or a step goes.
"""
REPORT_EXAMPLES = """\
examples:
  charrnn-fast report out                        writes out/report.html
  charrnn-fast report out -o page.html
"""
EXPORT_EXAMPLES = """\
examples:
  charrnn-fast export out                        writes out/model.onnx
  charrnn-fast export out -o step.onnx
The graph reads tokens [B] and state [layers, B, H]; it gives logits [B, V] and next_state; of an
LSTM cell_state and next_cell_state, too. Begin with states of zeros.
Its metadata holds the vocabulary.
"""


class Parser(argparse.ArgumentParser):
    """Errors are one line and exit with 2."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 for a failure, 2 for a wrong request."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that lacks a character shows "?"; in an ASCII locale Python's own choice is
        # surrogateescape, which refuses such a character.
        sys.stdout.reconfigure(errors="replace")
    try:
        options = parser().parse_args([with_hyphens(a) for a in arguments])
        if getattr(options, "threads", None):
            from .charlm.options import use_threads

            use_threads(options.threads)
        from .charlm.group import use_kernels

        use_kernels()
        command: Callable[[argparse.Namespace], int | None] = options.command
        return command(options) or 0
    except UsageError as error:
        return fail(error, 2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return fail(f"{where}{error.strerror or error}", 1)
    except TrainingDiverged as error:
        return fail(error, 1)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate" not in str(error):
            raise
        return fail("not enough memory; a smaller model or batch needs less", 1)
    except KeyboardInterrupt as interrupt:
        return fail(str(interrupt) or "interrupted", 130)


def fail(error: object, code: int) -> int:
    print(f"charrnn-fast: {error}".replace("\n", " "), file=sys.stderr)
    return code


def with_hyphens(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    from .charlm.model import Cell
    from .charlm.options import DEFAULT_CELL

    main = Parser(
        prog="charrnn-fast",
        description="Character-level language models with fast recurrent layers.",
        epilog=EXAMPLES,
        formatter_class=raw,
        allow_abbrev=False,
    )
    main.add_argument("--version", action="version", version=version())
    subparsers = main.add_subparsers(required=True, metavar="COMMAND")

    def add(
        name: str, command: Callable[[argparse.Namespace], int | None], help: str, epilog: str = ""
    ) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = subparsers.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=epilog,
            formatter_class=raw,
            allow_abbrev=False,
        )
        sub.set_defaults(command=command)
        return sub

    train = add("train", commands.train, "train a model on a text", TRAIN_EXAMPLES)
    add_train_options(train)

    sample = add("sample", commands.sample, "write text with a trained model", SAMPLE_EXAMPLES)
    sample.add_argument("run", metavar="RUN", help="folder of a run")
    text = sample.add_argument
    text("--start", "--prompt", "--prime-text", "--primetext", default="", metavar="TEXT",
         help="text to continue, or FILE:path")  # fmt: skip
    text("--length", "--max-new-tokens", type=int, default=500, help="characters to draw (500)")
    text("--num-samples", "--streams", type=int, default=1, help="texts to draw (1)")
    text("--temperature", type=float, help="below 1 is tamer, above wilder (1.0)")
    text("--greedy", action="store_true", help="always the best character: --temperature 0")
    text("--top-k", type=int, default=0, help="draw from the k best (0: all)")
    text("--top-p", type=float, default=1.0, help="draw from the best that make up p (1: all)")
    text("--seed", type=int, help="same seed, same text (without: another one each time)")
    text("--stop", default="", metavar="TEXT", help="end before this text")
    add_unknown_option(sample, "the prompt")
    text(
        "-o",
        "--output",
        metavar="FILE",
        help="write there instead of to the terminal (in byte mode: the very bytes)",
    )
    add_run_options(sample)

    evaluate = add("eval", commands.eval, "measure how well a model predicts a text", EVAL_EXAMPLES)
    evaluate.add_argument("run", metavar="RUN", help="folder of a run")
    evaluate.add_argument("text", metavar="TEXT", nargs="?",
                          help="UTF-8 file (without: what the run held out)")  # fmt: skip
    add_unknown_option(evaluate, "the text")
    add_run_options(evaluate)

    report = add("report", commands.report, "make one HTML page about a run", REPORT_EXAMPLES)
    report.add_argument("run", metavar="RUN", help="folder of a run")
    report.add_argument("-o", "--output", metavar="FILE", help="(RUN/report.html)")
    report.add_argument("--backend", choices=("fast", "torch"), default="fast")
    report.add_argument("--threads", type=int, default=0, help="threads to compute with")

    export = add("export", commands.export, "write a model as ONNX", EXPORT_EXAMPLES)
    export.add_argument("run", metavar="RUN", help="folder of a run")
    export.add_argument("-o", "--output", metavar="FILE", help="(RUN/model.onnx)")
    export.add_argument("--last", action="store_true", help="the last weights, not the best ones")

    bench = add(
        "bench", commands.bench, "time training and sampling of both backends", BENCH_EXAMPLES
    )
    bench.add_argument("--seconds", type=float, default=2.0, help="for a side and a task (2.0)")
    add_train_options(bench, to_run=False)

    add("info", commands.info, "show versions, instruction sets and threads")
    demo = add("demo", commands.demo, "train on the built-in text, and compare with torch.nn")
    demo.add_argument("--cell", "--model", choices=get_args(Cell), default=DEFAULT_CELL)
    demo.add_argument("--out-dir", help="folder for the run (without: a new one in /tmp)")
    demo.add_argument("--max-epochs", type=int, default=5, help="passes over the text (5)")
    demo.add_argument("--max-iters", type=int, default=0, help="steps, in place of epochs")
    return main


def add_unknown_option(sub: argparse.ArgumentParser, where: str) -> None:
    sub.add_argument("--on-unknown", choices=("error", "skip", "replace"), default="error",
                     help=f"what to do with characters of {where} that the model has never seen; "
                          "replace puts a space")  # fmt: skip


def add_run_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--last", action="store_true", help="the last weights, not the best ones")
    sub.add_argument("--backend", choices=("fast", "torch"), default="fast")
    sub.add_argument("--device", default="cpu")
    sub.add_argument("--threads", type=int, default=0, help="threads to compute with")


def add_train_options(sub: argparse.ArgumentParser, to_run: bool = True) -> None:
    """The fields of TrainOptions as flags; what concerns the folder of a run only ``to_run``."""
    from .charlm.options import TrainOptions, choices_of

    for f in fields(TrainOptions):
        about: dict[str, Any] = {"help": f.metadata["help"], "default": argparse.SUPPRESS}
        if not (to_run or f.metadata["bench"]):
            continue
        if f.name == "text":
            sub.add_argument("text", metavar="TEXT", nargs="?", **about)
            continue
        names = [f.name, *f.metadata["aliases"]]
        flags = ["--" + name.replace("_", "-") for name in names]
        if isinstance(f.default, bool):
            sub.add_argument(*flags, action=argparse.BooleanOptionalAction, **about)
            continue
        if f.default is not None:
            about["help"] += f" ({f.default})"
        if f.name == "threads" and not to_run:
            about |= {"nargs": "?", "const": False}
            about["help"] += "; without a number: how calls scale with threads here"
        if choices := choices_of(f.name):
            sub.add_argument(*flags, choices=choices, dest=f.name, **about)
        else:
            kind = f.metadata["kind"]
            name = kind.__name__.upper()
            sub.add_argument(*flags, type=kind, dest=f.name, metavar=name, **about)
    sub.add_argument("--config", metavar="FILE", help="TOML file with options by these names")
    if not to_run:
        return
    sub.add_argument("--resume", metavar="RUN", help="go on with a run from its last checkpoint")
    sub.add_argument("--overwrite", action="store_true", help="replace the run in --out-dir")


def version() -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("charrnn_fast")
    except PackageNotFoundError:
        return "unknown (not installed)"
