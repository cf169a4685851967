"""Runs of compilers and linkers, of which only those are done that are out of date."""

import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import NamedTuple


class Step(NamedTuple):
    """A run of a compiler or linker."""

    kind: str  # one of ORDER
    output: str
    command: list[str]
    inputs: list[str]

    # In which they are begun: a step waits for its inputs, and should not keep a thread for that.
    ORDER = ("nvcc", "compile", "link")

    def is_made(self):
        """Whether the output is there, by this command, later than all that went into it."""
        try:
            with open(f"{self.output}.made", encoding="utf-8") as file:
                started, command, inputs = json.load(file)
            changed = max(map(os.path.getmtime, inputs))
            return command == self.command and changed < started and os.path.exists(self.output)
        except (OSError, ValueError):
            return False

    def make(self):
        """Runs the command.

        Raises:
            subprocess.CalledProcessError: It failed.
        """
        print(f"{self.kind} {self.output}", flush=True)
        started = time.time()
        os.makedirs(os.path.dirname(self.output), exist_ok=True)
        for path in (f"{self.output}.made", self.output):  # a process may have the old one mapped
            if os.path.exists(path):
                os.remove(path)
        subprocess.run(self.command, check=True)
        inputs = list(self.inputs)
        if self.kind != "link":  # the compiler has listed what it included
            with open(f"{self.output}.d", encoding="utf-8") as file:
                inputs += shlex.split(file.read().replace("\\\n", "").partition(": ")[2])
        with open(f"{self.output}.made", "w", encoding="utf-8") as file:
            json.dump([started, self.command, inputs], file)


def make_all(steps, jobs):
    """Does the steps that are not done already, some at once, up to the first that fails.

    Returns whether none did.
    """
    running = {}

    def make(step):
        for path in step.inputs:
            if path in running:  # begun before, or done
                running[path].result()
        if not step.is_made():
            step.make()

    with ThreadPoolExecutor(jobs) as pool:
        for step in sorted(steps, key=lambda step: Step.ORDER.index(step.kind)):
            running[step.output] = pool.submit(make, step)
        done, _ = wait(running.values(), return_when=FIRST_EXCEPTION)
        pool.shutdown(wait=False, cancel_futures=True)
    errors = {future.exception() for future in done} - {None}
    print(*errors, sep="\n", end="\n" * bool(errors), file=sys.stderr)
    return not errors


def write(path, text):
    """Writes `text`; what depends on it stays up to date if it is there. Returns `path`."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        file.seek(0)
        if file.read() != text:
            file.truncate(0)
            file.write(text)
    return path
