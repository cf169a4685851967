"""The CUDA kernels, without a GPU: emulated on the CPU, and compiled by nvcc where there is one.

"Emulated" means that g++ compiled the kernels' sources against emulator.h. What only a device can
show is listed in docs/cuda.md; the tests that need one report skipped here.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gpu
import gpu_parity
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "cuda"
KERNELS = ["recurrence_forward", "recurrence_backward", "elementwise", "generate"]
HOST = ["csrc/layer.cpp", "csrc/composite.cpp", "csrc/generate_checks.cpp"]
HOST += [f"csrc/cuda/{name}.cpp" for name in ("layer_cuda", "generate_cuda", "plan")]
COMPILER = [*(["ccache"] if shutil.which("ccache") else []), shutil.which("g++") or "g++"]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is needed to emulate")


def run(command, **environment):
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, cwd=ROOT
    )
    return done.returncode, done.stdout + done.stderr


def compile_all(sources, folder, *flags):
    def compile_one(source):
        target = str(folder / (Path(source).name + ".o"))
        code, text = run(
            [
                *(*COMPILER, "-std=c++20", "-O2", "-Wno-unknown-pragmas", "-Icsrc", "-Itests/cuda"),
                *(*flags, "-x", "c++", "-c", source, "-o", target),
            ]
        )
        assert code == 0, text
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


def build_program(folder, *flags):
    names = ("kernels", "recurrence", "generate", "plans")
    sources = [*(f"tests/cuda/test_{name}.cpp" for name in names), "csrc/cuda/plan.cpp"]
    sources += [f"csrc/cuda/{kernel}.cu" for kernel in KERNELS]
    program = str(folder / "test_kernels")
    objects = compile_all(sources, folder, *flags)
    code, text = run(["g++", *flags, *objects, "-o", program])
    assert code == 0, text
    return program


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build_program(tmp_path_factory.mktemp("emulated"))


def test_emulated_kernels_match_float64(program):
    """All block tiles, grid tiles, steps, tokens, generation, in uneven thread orders."""
    code, text = run([program, "parity", "quick"])
    assert code == 0, text


@pytest.mark.slow
def test_emulated_kernels_match_float64_in_full(program):
    """The widest grid tiles too, more shapes, and every order of threads: about three minutes."""
    code, text = run([program, "parity"])
    assert code == 0, text


def test_emulated_faults_are_caught(program):
    """Each barrier and shuffle left out in turn is noticed; so are stores out of bounds."""
    code, text = run([program, "faults"])
    assert code == 0, text
    assert "NOT CAUGHT" not in text
    assert text.count(": caught") > 20


def test_plans_for_real_devices(program):
    """Limits of T4, A100, L4, H100, B200: every plan fits its device and leaves nothing out."""
    code, text = run([program, "plan"])
    assert code == 0, text


def test_rooflines_of_the_docs_are_those_of_the_plan(program):
    """Where this fails, put the output of `test_kernels rooflines` into docs/cuda.md."""
    code, text = run([program, "rooflines"])
    assert code == 0
    assert load_check_ptxas().split_page(ROOT / "docs/cuda.md", "test_kernels rooflines")[1] == text


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_emulated_under_sanitizer(tmp_path, sanitizer):
    """No report on the kernels; ThreadSanitizer does report one where a barrier is left out."""
    program = build_program(tmp_path, f"-fsanitize={sanitizer}", "-g", "-O1")
    environment = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "report_bugs=1"}
    code, text = run([program, "races"], **environment)
    assert code == 0, text
    assert "Sanitizer" not in text
    assert "runtime error" not in text
    if sanitizer == "thread":
        code, text = run([program, "race"], **environment)
        assert "ThreadSanitizer: data race" in text


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    from torch.utils.cpp_extension import include_paths

    folder = tmp_path_factory.mktemp("library")
    flags = ["-fPIC", "-fvisibility=hidden"]
    for path in include_paths():
        flags += ["-isystem", path]
    sources = [*HOST, "tests/cuda/emulated_op.cpp"]
    sources += [f"csrc/cuda/{kernel}.cu" for kernel in KERNELS]
    objects = compile_all(sources, folder, *flags)
    path = str(folder / "emulated.so")
    folder = os.path.join(os.path.dirname(torch.__file__), "lib")
    code, text = run(
        ["g++", "-shared", *objects, "-o", path, f"-L{folder}", "-ltorch", "-ltorch_cpu", "-lc10"]
    )
    assert code == 0, text
    return path


@pytest.mark.parametrize("design", ["block", "grid", "step"])
def test_emulated_module_parity(library, design):
    """Layers, directions, packed, lengths, tokens, gradients through the CUDA path's host code."""
    code, text = run(
        [sys.executable, str(HERE / "emulated_parity.py"), library],
        CHARRNN_FAST_DESIGN=design,
        OMP_NUM_THREADS="1",
        PYTHONPATH=str(ROOT),
    )
    assert code == 0, text


def test_gpu_report_in_a_dry_run(library, tmp_path):
    """`make gpu-report` on emulated kernels: all parts run, and agree; no device, no speed."""
    code, text = run(
        [sys.executable, str(HERE / "gpu.py"), "report", str(tmp_path), "--dry-run", library],
        OMP_NUM_THREADS="1",
    )
    page = (tmp_path / "report.md").read_text()
    assert code == 0, text + page
    assert "A dry run on emulated kernels" in page
    results = json.loads((tmp_path / "report.json").read_text())["results"]
    counts = Counter(result["part"] for result in results if "skipped" not in result)
    assert counts["parity"] > 50
    padded = [r for r in results if r["name"].startswith("RNN ") and " padded " in r["name"]]
    assert {r["by"] for r in padded if r["part"] == "parity"} == {"kernels"}
    assert counts["generation"] >= 8
    assert counts["bench"] == 1
    assert counts["capture"] == counts["sanitizer"] == 0  # nothing is claimed of them


def test_gpu_report_notices_a_wrong_number(monkeypatch):
    """One gradient that is a hundredth off, one output that is, and a NaN fail a case of parity."""
    import charrnn_fast

    results = []
    monkeypatch.setattr(gpu_parity, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_parity, "say", lambda **result: results.append(result))
    monkeypatch.setattr(gpu_parity, "layers_run", lambda: 0)

    def case(spoil):
        run_one = gpu_parity.run

        def spoilt(torch, module, *arguments):
            found = run_one(torch, module, *arguments)
            if type(module) is charrnn_fast.RNN:
                spoil(found)
            return found

        with monkeypatch.context() as patch:
            patch.setattr(gpu_parity, "run", spoilt)
            plain = ("RNN", 9, torch.float32, "padded", {}, "case")
            gpu_parity.parity_case(torch, charrnn_fast, *plain)
        return results.pop()["ok"]

    assert case(lambda found: None)
    for place in range(8):  # output, h_n, and gradients of x, hx and four parameters
        assert not case(lambda found, place=place: found[place].view(-1)[-1].add_(0.01)), place
    assert not case(lambda found: found[0].view(-1)[0].fill_(float("nan")))


def test_gpu_report_survives_its_parts(tmp_path, monkeypatch):
    """A part that dies or hangs after some results: they are kept, and the others run."""
    bad = tmp_path / "bad.py"
    bad.write_text(
        "import os, sys, time\n"
        'print(\'RESULT {"part": "%s", "name": "first", "ok": true}\' % sys.argv[1])\n'
        "sys.stdout.flush()\n"
        "os.abort() if sys.argv[1] == 'parity' else time.sleep(600) if sys.argv[1] == 'capture' else 0\n"
    )
    monkeypatch.setattr(gpu, "RUNNER", bad)
    monkeypatch.setattr(gpu, "PARTS", {"parity": 2, "capture": -9, "bench": 2})
    assert gpu.report(tmp_path, "none", ("parity", "capture", "bench")) == 2
    content = json.loads((tmp_path / "report.json").read_text())
    assert [(r["part"], r["ok"]) for r in content["results"]] == [
        ("parity", True),
        ("parity", False),
        ("capture", True),
        ("capture", False),
        ("bench", True),
    ]
    assert "stopped after 1 s" in (tmp_path / "report.md").read_text()


def test_gpu_report_without_a_device(tmp_path):
    """It says so and fails, rather than report what it has not seen."""
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    code, text = run([sys.executable, str(HERE / "gpu.py"), "report", str(tmp_path)])
    assert code == 1, text
    page = (tmp_path / "report.md").read_text()
    assert "build, asking for the device: `" in page
    assert "parity, the part itself: `ended with 1" in page


def load_check_ptxas():
    spec = importlib.util.spec_from_file_location("check_ptxas", HERE / "check_ptxas.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_ptxas(*arguments):
    if load_check_ptxas().find_nvcc() is None:
        pytest.skip("nvcc was not found")
    code, text = run([sys.executable, str(HERE / "check_ptxas.py"), *arguments])
    assert code == 0, text


def test_table_of_registers_is_of_these_tiles():
    """Each instance of a kernel has a row in registers.md, with its tile's shared memory."""
    module = load_check_ptxas()
    lines = module.split_page(HERE / "registers.md")[1].splitlines()
    rows = {cells[1]: cells[-2] for cells in (re.split(r" *\| *", line) for line in lines[4:])}
    names = []
    for design in ("block", "grid"):
        for tile, shape in enumerate(module.tiles(design)):
            stored = [" float16", " bfloat16"] if shape[3] else [""]
            for direction in ("forward", "backward"):
                names += [f"{design} {direction} tile {tile}{kind}" for kind in stored]
    assert {name for name in rows if name.startswith(("block", "grid"))} == set(names)
    for name in names:
        assert rows[name] == f"{module.weights_in_shared(name) // 1024} KB"


def test_nvcc_compiles_small_kernels():
    check_ptxas("--arch", "80", "--source", "elementwise.cu", "generate.cu")


@pytest.mark.slow
def test_nvcc_compiles_without_spills():
    """sm_75, 80, 90, 100 and PTX; and registers.md has the table that came of it."""
    check_ptxas("--compare", "tests/cuda/registers.md")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("part", ["parity", "generation", "capture"])
def test_on_a_device(part):
    """What `make gpu-report` asks of a device, of the build that is there. Has never run."""
    code, shown = run([sys.executable, str(HERE / "gpu_parts.py"), part, "300"])
    results = [json.loads(line[7:]) for line in shown.splitlines() if line.startswith("RESULT ")]
    assert code == 0, shown
    assert results
    assert all(result["ok"] for result in results), shown
