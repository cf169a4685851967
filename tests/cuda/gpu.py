"""What only a device can tell, in one command: `make gpu-report OUT=dir`. Has never run on one.

usage: gpu.py report DIR [--dry-run LIBRARY]
       gpu.py test | bench           parts of it, without building

The report wants Python, torch with CUDA, numpy, nvcc and a C++ compiler, and nothing else. Each part
(gpu_parts.py) is a process of its own with a time limit, the most valuable first: one that fails,
hangs or spoils its device does not stop the next. DIR/report.md and DIR/report.json are written anew
after each.

--dry-run takes the emulated kernels (tests/cuda/test_cuda.py builds them) for a device: everything
but speed, graphs and compute-sanitizer is then what a device would run.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from gpu_page import write

ROOT = Path(__file__).resolve().parents[2]
RUNNER = Path(__file__).with_name("gpu_parts.py")
LIMIT = 450  # seconds for everything: eight minutes, less what it takes to start and to write
# Seconds for each part at most, in this order. What a part leaves is for those after it.
PARTS = {
    "machine": 20,
    "parity": 90,
    "generation": 30,
    "capture": 30,
    "sanitizer": 70,
    "bench": 110,
}
BUILD = 240


def collect(name, seconds, environment):
    """The results of one part, its seconds and what it said; what came before a failure counts."""
    start = time.monotonic()
    command = [sys.executable, "-u", RUNNER, name, str(seconds)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        text, ended = process.communicate(timeout=seconds + 10)[0], None
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # what it started, too
        text, ended = process.communicate()[0], f"stopped after {seconds + 10:.0f} s"
    results, other = [], []
    for line in text.splitlines():
        if line.startswith("RESULT "):
            results.append(json.loads(line.removeprefix("RESULT ")))
        else:
            other.append(line)
    if ended is None and process.returncode:
        ended = f"ended with {process.returncode}"
    if ended:
        said = "\n".join(other)[-2000:]
        results.append(
            {"part": name, "name": "the part itself", "ok": False, "error": f"{ended}: {said}"}
        )
    return results, time.monotonic() - start


def build(folder, environment):
    """The package with kernels for this device alone, in a folder of its own."""
    query = "import torch; print('%d%d' % torch.cuda.get_device_capability())"
    start = time.monotonic()
    found = subprocess.run([sys.executable, "-c", query], capture_output=True, text=True)
    arch = os.environ.get("CHARRNN_FAST_CUDA_ARCHS") or found.stdout.strip()
    if not arch:
        error = found.stderr[-1000:]
        return [{"part": "build", "name": "asking for the device", "ok": False, "error": error}], 0
    variables = {
        **environment,
        "CHARRNN_FAST_CUDA": "1",
        "CHARRNN_FAST_CUDA_ARCHS": arch,
        "CHARRNN_FAST_VARIANT": f"-gpu-{arch}",
        "MAX_JOBS": os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1),
    }
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(folder)]
    result = {"part": "build", "name": f"for compute capability {arch}", "ok": True}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=BUILD
        )
        if done.returncode:
            result |= {"ok": False, "error": (done.stdout + done.stderr)[-3000:]}
    except subprocess.TimeoutExpired:
        result |= {"ok": False, "error": f"did not end within {BUILD} s"}
    return [result], time.monotonic() - start


def report(folder, dry="", parts=tuple(PARTS), built=True):
    """Runs the parts and writes what they found; the number of failures."""
    start, results, seconds = time.monotonic(), [], {}
    environment = {**os.environ, "CHARRNN_FAST_DRY_RUN": dry}
    where = ROOT
    if not dry and built:
        where = folder / "build"
        results, seconds["build"] = build(where, environment)
        write(folder, results, seconds, dry)
    environment["PYTHONPATH"] = str(where)
    for name in parts:
        left = LIMIT - (time.monotonic() - start)
        if left < 15:
            results.append({"part": name, "name": "no time was left", "ok": False, "error": ""})
            seconds[name] = 0.0
        else:
            found, seconds[name] = collect(name, min(PARTS[name], left - 12), environment)
            results += found
        write(folder, results, seconds, dry)
        failed = [r for r in results if r["part"] == name and not r["ok"]]
        print(f"{name:10} {seconds[name]:4.0f} s  {'FAILED ' * bool(failed)}"
              f"{len(failed)} of {sum(r['part'] == name for r in results)} failed", flush=True)  # fmt: skip
    return sum(not r["ok"] for r in results)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_subparsers(dest="what", required=True)
    whole = what.add_parser("report")
    whole.add_argument("folder", type=Path)
    whole.add_argument("--dry-run", default="", metavar="LIBRARY")
    what.add_parser("test")
    what.add_parser("bench")
    options = parser.parse_args()
    if options.what == "report":
        failed = report(options.folder.resolve(), options.dry_run)
        print(f"{failed} failed; see {options.folder}/report.md")
    else:
        parts = ("bench",) if options.what == "bench" else tuple(p for p in PARTS if p != "bench")
        failed = report(ROOT / "build" / "gpu", parts=parts, built=False)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
