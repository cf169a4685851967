from typing import Any

from torch import Tensor, dtype

def forward(
    module: object,
    input: object,
    hx: object,
    lengths: object,
    resets: object,
    cells: object,
    /,
) -> tuple[Any, ...] | None: ...
def call(module: object, args: tuple[Any, ...], kwargs: dict[str, Any], /) -> Any: ...
def cell(module: object, input: object, hx: object, reset: object, /) -> Any: ...
def describe(
    ours: type,
    stock: type,
    is_cell: bool,
    pair: bool,
    cuda: bool,
    gates: int,
    mode: str,
    hooks: list[str],
    /,
) -> int: ...
def batch_first(output: Tensor, /) -> Tensor: ...
def squeeze_step(output: Tensor, /) -> Tensor: ...
def build_info() -> dict[str, Any]: ...
def isas() -> list[str]: ...
def isa() -> str: ...
def select_isa(name: str) -> None: ...
def counters() -> dict[str, int]: ...
def plan(
    T: int, B: int, rows: int, I: int, H: int, D: int, mode: str, backward: bool
) -> tuple[int, str, bool]: ...
def modelled_plan(
    threads: int,
    node_cores: int,
    l2: float,
    cell: int,
    T: int,
    B: int,
    rows: int,
    I: int,
    H: int,
    D: int,
    backward: bool,
) -> tuple[int, str, bool, float]: ...
def machine() -> tuple[int, int, float]: ...
def cgroup_cpus(root: str, membership: str) -> int: ...
def why_composite(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: list[Tensor],
    resets: Tensor | None,
    mode: str,
) -> str | None: ...
def saved_numbers(mode: str) -> int: ...
def computed_in(dtype: dtype) -> dtype: ...
