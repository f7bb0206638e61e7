# SPDX-License-Identifier: Apache-2.0
"""The memory of packed weights: tensors do not overlap, and go back to the system."""

import copy
import gc
import io
from pathlib import Path

import torch

from mmq_ext import memory, ops
from mmq_ext.memory import empty_bytes

KB, MB = 1 << 10, 1 << 20


def mapped() -> int:
    """Bytes of this process's private mappings without a file."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) * KB


def test_tensors_do_not_overlap():
    sizes = [300 * KB + 1, 3 * MB, 256 * KB, 9 * MB + 5, 7 * MB, 1, 400 * KB]
    tensors = [empty_bytes(size).fill_(i) for i, size in enumerate(sizes)]
    for i, (tensor, size) in enumerate(zip(tensors, sizes, strict=True)):
        assert tensor.shape == (size,)
        assert tensor.data_ptr() % 64 == 0
        assert bool((tensor == i).all())


def test_a_large_tensor_begins_with_a_huge_page_and_small_ones_share_one():
    large = empty_bytes(20 * MB)
    assert large.data_ptr() % (2 * MB) == 0
    first, second = (empty_bytes(300 * KB) for _ in range(2))
    assert second.data_ptr() - first.data_ptr() == 300 * KB


def test_memory_is_given_back_with_the_last_tensor():
    empty_bytes(64 * MB)  # whatever the block before had left is out of use
    kept = [empty_bytes(1 * MB).fill_(1) for _ in range(3)]
    with_all = mapped()
    del kept[1:]
    assert memory._block is not None
    assert memory._block() is not None
    kept.clear()
    gc.collect()
    assert memory._block() is None
    assert mapped() <= with_all - 2 * MB  # others may have allocated
    assert empty_bytes(1 * MB).fill_(2).sum() == 2 * MB


def test_tiles_are_ordinary_tensors():
    words = torch.randint(-(2**31), 2**31, (1024, 256), dtype=torch.int32)
    tiles = ops.repack(words, 4, 2048)
    assert tiles.data_ptr() % 64 == 0
    assert torch.equal(copy.deepcopy(tiles), tiles)
    file = io.BytesIO()
    torch.save(tiles, file)
    assert file.tell() < tiles.numel() + 64 * KB
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), tiles)
    assert torch.equal(ops.unrepack(tiles, 4, 1024, 2048), words)
