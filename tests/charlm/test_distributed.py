"""Training by two processes under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import metrics, step_of, tensors_of, weights

from charrnn_fast.charlm import Trainer, train


def torchrun(code: list[str], folder: Path) -> None:
    """Two processes on the CPU; torchrun's own files go to a folder of the test's."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    done = subprocess.run([*command, *code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


GRADIENTS = """
import gc
from pathlib import Path
import torch
from charrnn_fast.charlm import Trainer, TrainOptions
trainer = Trainer({options!r}, say=None)
for _ in range(3):
    trainer.train_step()
torch.save([p.grad for p in trainer.model.parameters()], "{folder}/grads-%d" % trainer.group.rank)
gc.disable()  # what refers to itself is left to leave_group
trainer.leave_group()
threads = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
assert not [name for name in threads if "gloo" in name], threads
"""


@pytest.mark.parametrize("lines", [False, True])
def test_two_processes_have_the_gradients_of_one(options, tmp_path, backend, lines):
    """torchrun with gloo: each has half of the batch, and after the exchange the whole's gradient.

    The same bits in both; those of one process up to the order of a sum. Lines of different
    lengths give the processes different numbers of characters, which must not change the weights.
    """
    text = "".join(f"{'ab' * (n % 7)} line {n}\n" for n in range(40))
    Path(options.text).write_text(text * 4)
    options = replace(options, backend=backend, lines=lines, grad_clip=0.0)
    one = Trainer(replace(options, out_dir=options.out_dir + "-one"), say=None)
    for _ in range(3):
        one.train_step()
    script = tmp_path / "script.py"
    code = "from charrnn_fast.charlm import TrainOptions\n"
    script.write_text(code + GRADIENTS.format(options=options, folder=tmp_path))
    torchrun([str(script)], tmp_path)
    first, second = (torch.load(tmp_path / f"grads-{n}", weights_only=True) for n in (0, 1))
    for parameter, a, b in zip(one.model.parameters(), first, second, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, parameter.grad, rtol=1e-4, atol=1e-6)


UNTIL = """
from charrnn_fast.charlm import Trainer, TrainOptions

def count(loss, left=[{steps}]):
    left[0] -= 1
    if not left[0]:
        raise SystemExit

trainer = Trainer({options!r}, resume={resume}, say=None, on_loss=count)
try:
    trainer.run()
except SystemExit:
    pass
trainer.leave_group()
"""


@pytest.mark.parametrize("changes", [{"dropout": 0.3, "save_interval": 3}, {"lines": True}])
def test_two_processes_resume_as_if_never_stopped(options, tmp_path, changes):
    """To the same bits: each has its own random numbers, carried state and sum of losses."""
    options = replace(options, max_epochs=2, **changes)
    whole, saved = replace(options, out_dir=options.out_dir + "-whole"), []
    for number, (own, resume, steps) in enumerate(
        [(whole, False, 0), (options, False, 15 if options.lines else 23), (options, True, 0)]
    ):
        script = tmp_path / f"{number}.py"
        script.write_text(UNTIL.format(options=own, resume=resume, steps=steps))
        torchrun([str(script)], tmp_path)
        saved.append(step_of(Path(own.out_dir)))
    assert 0 < saved[1] < saved[0] == saved[2]
    for name in ("model.safetensors", "last.safetensors"):
        a, b = (weights(folder, name) for folder in (options.out_dir, whole.out_dir))
        assert tensors_of(a) == tensors_of(b)
    assert metrics(options.out_dir) == metrics(whole.out_dir)


def test_two_processes_train_like_one(options, tmp_path):
    """The whole run: the same losses, and one set of files, which the first process writes."""
    options = replace(options, max_epochs=2, val_fraction=0.2)
    train(options, out_dir=options.out_dir + "-one", say=None)
    flags = [
        f"--{k.replace('_', '-')}={v}"
        for k, v in vars(options).items()
        if k != "text" and not isinstance(v, bool) and v is not None
    ]
    torchrun(["-m", "charrnn_fast", "train", options.text, *flags], tmp_path)
    one, two = metrics(options.out_dir + "-one"), metrics(options.out_dir)
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    longer = train(out_dir=options.out_dir, resume=True, max_epochs=3, say=None)  # by one
    assert longer.progress.step == 3 * len(longer.batches)
