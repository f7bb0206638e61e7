# SPDX-License-Identifier: Apache-2.0
# Addresses are data pointers; see mmq_ext/ops.py for shapes and dtypes.

def pack(codes: int, rows: int, cols: int, bits: int, words: int) -> None: ...
def unpack(words: int, rows: int, cols: int, bits: int, codes: int) -> None: ...
def repack(words: int, n: int, k: int, bits: int, tiles: int) -> None: ...
def unrepack(tiles: int, n: int, k: int, bits: int, words: int) -> None: ...
def packed_gemm(
    x: int,
    tiles: int,
    affine: int,
    bias: int,
    y: int,
    m: int,
    n: int,
    k: int,
    group_size: int,
    bits: int,
    mode: int,
) -> None: ...
def gptq_block(
    w: int,
    u: int,
    scales: int,
    zeros: int,
    group_of: int,
    codes: int,
    errors: int,
    n: int,
    cols: int,
    groups: int,
    bits: int,
    float_zero: bool,
    min_code: int,
) -> None: ...
def awq_errors(
    w: int,
    candidates: int,
    factor: int,
    errors: int,
    n: int,
    k: int,
    rows: int,
    count: int,
    group_size: int,
    bits: int,
    kind: int,
    scale_type: int,
) -> None: ...
def grid_search(
    w: int,
    importance: int,
    scales: int,
    zeros: int,
    n: int,
    k: int,
    group_size: int,
    bits: int,
    kind: int,
    scale_type: int,
    steps: int,
    shrink: float,
    exponent: float,
) -> None: ...
def cpu_isa() -> str: ...
def cpu_isas() -> list[str]: ...
def select_isa(name: str) -> str: ...
def max_threads() -> int: ...
def threading_backend() -> str: ...
