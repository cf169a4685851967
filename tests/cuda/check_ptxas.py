"""Compiles the kernels with nvcc and reads what ptxas says of them.

usage: check_ptxas.py [--arch 75 80 90 100] [--write PAGE | --compare PAGE]

Prints a table of registers, the blocks of 256 threads that they let a multiprocessor have, stack
and spills, and of the shared memory that holds weights; exits with 1 when a kernel that runs once a
step or more has a stack frame or spills. PAGE is tests/cuda/registers.md: the table is put into it, or must be
the one that is in it (unless that is of another nvcc).
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ["recurrence_forward.cu", "recurrence_backward.cu", "elementwise.cu", "generate.cu"]
HOT = ("block", "grid", "step", "generate")  # the kernels that run once a step or more
THREADS = {"75": 1024, "80": 2048, "90": 2048, "100": 2048}  # that a multiprocessor can have
END = "<!-- end of that output -->\n"


def find_nvcc():
    """The path of nvcc, or None."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which(os.path.join(home, "bin", "nvcc"))


def compile_one(nvcc, source, arch, folder):
    """What ptxas -v says; the object also holds PTX, for devices to come."""
    command = [nvcc, "-std=c++20", "-O3", "-Xptxas", "-v", "-c", str(ROOT / "csrc/cuda" / source)]
    command += [f"-gencode=arch=compute_{arch},code=[sm_{arch},compute_{arch}]"]
    command += ["-o", os.path.join(folder, f"{source}.{arch}.o")]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stdout + run.stderr)
    return run.stderr


def demangled(symbol):
    """Readable names of our kernels."""
    direction = {"0": "forward", "1": "backward"}
    found = re.search(r"(block|grid)_recurrenceILi(\d+)ELb([01])E(\S*?)EEvNS|$", symbol)
    if found.group(1):
        stored = found.group(4) or ""
        packed = " float16" if "PackedFloat16" in stored else ""
        packed = " bfloat16" if "PackedBFloat16" in stored else packed
        return f"{found.group(1)} {direction[found.group(3)]} tile {found.group(2)}{packed}"
    found = re.search(r"grid_recurrenceILi(\d+)ELb([01])E", symbol)
    if found:
        return f"grid {direction[found.group(2)]} tile {found.group(1)}"
    names = "step_forward|step_backward|gather|segment_sum|generate"
    return re.search(rf"\d({names})E", symbol).group(1)


def tiles(design):
    """(outputs, quads, held, packed) of each tile of a design, from rnn_cuda.h."""
    header = (ROOT / "csrc/cuda/rnn_cuda.h").read_text()
    table = header.split(f"k{design.capitalize()}Tiles[] = {{")[1].split("};")[0]
    rows = re.findall(r"\{\d+, (\d+), (\d+), (\d+), (\w+)\}", table)
    return [(*map(int, row[:3]), row[3] == "true") for row in rows]


def weights_in_shared(name):
    """Bytes of weights that a tile keeps in shared memory; None: the kernel has no tiles."""
    design = name.split()[0]
    if design not in ("block", "grid"):
        return None
    outputs, quads, held, packed = tiles(design)[int(name.split()[3])]
    return (outputs * quads - held) * (8 if packed else 16) * 256


def kernels(text):
    """(name, registers, stack, spilled bytes) of each kernel in ptxas' output."""
    for part in text.split("Compiling entry function '")[1:]:
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) .*?, (\d+)", part).groups()
        )
        registers = int(re.search(r"Used (\d+) registers", part).group(1))
        yield demangled(part.split("'")[0]), registers, stack, stores + loads


def nvcc_release(nvcc):
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    return re.search(r"release ([\d.]+)", text).group(1)


def render(archs, table, release):
    """The table in Markdown. Threads come in blocks of 256, and registers of a thread in eights."""
    heads = ["kernel", *(f"sm_{arch}" for arch in archs), "weights in shared memory"]
    lines = [f"By nvcc {release}:", "", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, row in table.items():
        cells = []
        shared = weights_in_shared(name)
        for arch in archs:
            registers, stack, spills = row[arch]
            blocks = min(65536 // (256 * -(-registers // 8) * 8), THREADS[arch] // 256)
            note = f", {stack} B stack, {spills} B spilled" if stack or spills else ""
            cells.append(f"{registers} ({blocks}){note}")
        cells.append("" if shared is None else f"{shared // 1024} KB")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def split_page(path, command="check_ptxas.py"):
    """What comes before the output of a command in a page, that output, and what comes after it."""
    begin = f"<!-- the output of tests/cuda/{command} -->\n"
    before, rest = path.read_text().split(begin)
    table, after = rest.split(END, 1)
    return before + begin, table, END + after


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", nargs="+", default=["75", "80", "90", "100"])
    parser.add_argument("--source", nargs="+", default=SOURCES)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--compare", type=Path)
    options = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        sys.exit("nvcc was not found")
    table, bad = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for arch in options.arch:
            for source in options.source:
                for name, registers, stack, spills in kernels(
                    compile_one(nvcc, source, arch, folder)
                ):
                    table.setdefault(name, {})[arch] = (registers, stack, spills)
                    if name.startswith(HOT) and (stack or spills):
                        bad.append(f"{name} on sm_{arch}: {stack} bytes of stack, {spills} spilled")
    text = render(options.arch, table, nvcc_release(nvcc))
    print(text, end="")
    if options.write:
        before, _, after = split_page(options.write)
        options.write.write_text(before + text + after)
    if options.compare:
        committed = split_page(options.compare)[1]
        if committed.splitlines()[0] != text.splitlines()[0]:
            print(f"{options.compare} has the table of another nvcc: not compared")
        elif committed != text:
            bad.append(f"{options.compare} has another table; mend it with --write")
    for line in bad:
        print("FAIL", line)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
