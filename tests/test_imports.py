"""The files of the package import each other in one direction; what takes long comes late."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import charrnn_fast

PACKAGE = Path(charrnn_fast.__file__).parent


def modules(folder: Path) -> dict[str, Path]:
    """The files of a package by their dotted names; of the extension, the one that declares it."""
    found = {}
    for path in [*folder.rglob("*.py"), *folder.rglob("*.pyi")]:
        parts = path.relative_to(folder.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """What a file imports of its own package, anywhere in it: inside a function, too.

    ``from package import name`` is an import of the package only where ``name`` is no file of it:
    a package that is being imported can already give its files.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                part = f"{source}.{alias.name}"
                found.add(part if part in known else source)
    return found & known.keys() - {name}


def check(folder: Path) -> None:
    known = modules(folder)
    TopologicalSorter({name: imports(name, path, known) for name, path in known.items()}).prepare()


def test_no_files_import_each_other():
    """Neither at their beginning nor inside functions, directly or by way of others."""
    assert len(modules(PACKAGE)) > 30
    check(PACKAGE)


@pytest.mark.parametrize(
    "code", ["from .b import x", "from . import b", "import p.b", "def f():\n    import p.b as b"]
)
def test_a_circle_is_found(tmp_path: Path, code: str):
    """Whatever form one of its imports has."""
    folder = tmp_path / "p"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "a.py").write_text(code, encoding="utf-8")
    (folder / "b.py").write_text("from p.c import x", encoding="utf-8")
    (folder / "c.py").write_text("x = 1", encoding="utf-8")
    check(folder)
    (folder / "c.py").write_text("from .a import x", encoding="utf-8")
    with pytest.raises(CycleError):
        check(folder)


@pytest.mark.parametrize(
    "use", ["", "x = torch.randn(2, 1, 3); c.LSTM(3, 4)(x); c.RNN(3, 4).double()(x.double())"]
)
def test_what_takes_long_is_imported_late(use: str):
    """Neither an import nor a plain call waits for what exporting, compiling or training want."""
    code = f"""
import torch, sys
before = set(sys.modules)
import charrnn_fast as c
{use}
late = {{"torch.onnx", "torch._dynamo", "torch._inductor", "charrnn_fast.charlm", "onnx", "sympy"}}
print(sorted((late - before) & sys.modules.keys()))
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
