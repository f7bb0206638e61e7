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
    affine_kind: int,
    scale_type: int,
    bfloat16: bool,
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
def hessian_update(sum: int, x: int, tokens: int, k: int) -> None: ...
def cpu_isa() -> str: ...
def cpu_isas() -> list[str]: ...
def select_isa(name: str) -> str: ...
def max_threads() -> int: ...
def threading_backend() -> str: ...
def cuda_pack(codes: int, words: int, rows: int, cols: int, bits: int, stream: int) -> None: ...
def cuda_unpack(words: int, codes: int, rows: int, cols: int, bits: int, stream: int) -> None: ...
def cuda_repack(words: int, tiles: int, n: int, k: int, bits: int, stream: int) -> None: ...
def cuda_unrepack(tiles: int, words: int, n: int, k: int, bits: int, stream: int) -> None: ...
def cuda_tiles_bytes(n: int, k: int, bits: int) -> int: ...
def cuda_packed_gemm_workspace(
    m: int,
    n: int,
    k: int,
    group_size: int,
    bits: int,
    activation: int,
    affine_kind: int,
    scale_type: int,
) -> int: ...
def cuda_packed_gemm(
    x: int,
    tiles: int,
    affine: int,
    bias: int,
    perm: int,
    in_scale: int,
    y: int,
    workspace: int,
    m: int,
    n: int,
    k: int,
    group_size: int,
    bits: int,
    activation: int,
    affine_kind: int,
    scale_type: int,
    stream: int,
) -> None: ...
def cuda_gptq_block(
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
    stream: int,
) -> None: ...
def cuda_awq_errors_workspace(
    n: int,
    k: int,
    rows: int,
    count: int,
    group_size: int,
    bits: int,
    kind: int,
    scale_type: int,
) -> int: ...
def cuda_awq_errors(
    w: int,
    candidates: int,
    factor: int,
    errors: int,
    workspace: int,
    n: int,
    k: int,
    rows: int,
    count: int,
    group_size: int,
    bits: int,
    kind: int,
    scale_type: int,
    stream: int,
) -> None: ...
def cuda_library_path() -> str: ...
def cuda_status() -> dict[str, str | int]: ...
