"""Two Triton kernels that read logits once. Compiled and interpreted in tests; not run on a GPU so far.

Decoding has few rows (1 to 16) of 50,000 to 260,000 logits, so a program per row would leave most of a GPU
idle. The first kernel therefore cuts each row into blocks, one program each: it holds its block in registers
and leaves five numbers after. The second merges the blocks of a row as the online softmax does (Milakov and
Gimelshein 2018, arXiv 1805.02867), with the sum of x exp(x) accumulated for the entropy.

Bytes moved, for R rows of V logits of b bytes in blocks of B:

- read by the first kernel: R V b; nothing else depends on V
- written by the first and read by the second: 20 R ceil(V / B) each
- written by the second: 28 R; read for the proposed tokens: (8 + b) k

Eight rows of 151,936 bfloat16 logits, B = 4096: 2.43 MB of logits, 6 kB of block results. At full memory
bandwidth that is 0.73 microseconds on an H100 (3.35 TB/s) and 1.2 on an A100 (2.0 TB/s); 256,000 logits take
1.2 and 2.0. These are bounds by arithmetic, not measurements. At such sizes the two launches weigh more than
the reading: inside a CUDA graph a few microseconds in all, without one the host's time to launch. The
reference moves about 76 bytes a logit in some twenty launches, and that is what the kernels save.

Logits are read in 16-byte words where vocabulary and row stride are multiples of 16 elements, one by one
otherwise: where that matters, pad the vocabulary of the output head and mask the padding.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from viasd_calib.decoding.kernels.reference import LogitStatistics
from viasd_calib.slim.triton_jit import jit

try:
    import triton
    import triton.language as tl
except ImportError:  # the module can be imported anywhere; calling it needs Triton
    triton = None

WIDEST_BLOCK = 4096
NARROWEST_BLOCK = 1024
LOGITS_PER_WARP = 512
"""16 for each thread: two 16-byte loads in half precision, few enough registers for four bytes."""

PROGRAMS_PER_PROCESSOR = 2
"""Programs wanted for each streaming multiprocessor before blocks may widen."""


@jit()
def read_blocks(
    logits: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    vocabulary: tl.tensor,
    partials: tl.tensor,
    partial_ids: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Sum up one block of one row; grid (rows, blocks).

    Args:
        logits: [rows, vocabulary] with the given strides, in elements.
        partials: out, [4, rows, blocks], float32: the largest logit, the second largest, the sums of exp(d)
            and of d exp(d), where d is the distance to the largest of the block.
        partial_ids: out, [rows, blocks], int32: the lowest index of the largest logit.
    """
    row, block = tl.program_id(0), tl.program_id(1)
    rows, blocks = tl.num_programs(0), tl.num_programs(1)
    ids = block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    # A row may begin beyond 2^31 elements.
    start = logits + row.to(tl.int64) * row_stride
    values = tl.load(start + ids.to(tl.int64) * column_stride, mask=ids < vocabulary, other=-float("inf"))
    values = values.to(tl.float32)

    # The maximum of a GPU skips NaN: rank it as +inf, which the sums below turn back into NaN.
    ranked = tl.where(values == values, values, float("inf"))
    top = tl.max(ranked, 0)
    top_id = tl.min(tl.where(ranked == top, ids, 2147483647), 0)
    second = tl.max(tl.where(ids == top_id, -float("inf"), ranked), 0)
    after = values - tl.where(top == -float("inf"), 0.0, top)
    weights = tl.exp(after)
    # An impossible token would add -inf * 0.
    weighted = tl.where(weights == 0.0, 0.0, after * weights)

    place = row * blocks + block
    plane = rows * blocks
    tl.store(partials + place, top)
    tl.store(partials + plane + place, second)
    tl.store(partials + 2 * plane + place, tl.sum(weights, 0))
    tl.store(partials + 3 * plane + place, tl.sum(weighted, 0))
    tl.store(partial_ids + place, top_id)


@jit("n_tokens", "blocks")
def merge_blocks(
    partials: tl.tensor,
    partial_ids: tl.tensor,
    blocks: tl.tensor,
    logits: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    vocabulary: tl.tensor,
    tokens: tl.tensor,
    n_tokens: tl.tensor,
    floats: tl.tensor,
    argmax: tl.tensor,
    BLOCKS: tl.constexpr,
) -> None:
    """Merge the blocks of one row and compare its token, if it has one, with the largest logit; grid (rows,).

    Args:
        partials: what ``read_blocks`` left, as ``partial_ids``; ``BLOCKS`` >= ``blocks`` is a power of two.
        tokens: [n_tokens], one for each leading row.
        floats: out, [5, rows], float32: the float fields of ``LogitStatistics`` in their order.
        argmax: out, [rows], int64.
    """
    row, rows = tl.program_id(0), tl.num_programs(0)
    lane = tl.arange(0, BLOCKS)  # [BLOCKS]
    inside = lane < blocks
    place = row * blocks + lane
    plane = rows * blocks
    tops = tl.load(partials + place, mask=inside, other=-float("inf"))
    seconds = tl.load(partials + plane + place, mask=inside, other=-float("inf"))
    totals = tl.load(partials + 2 * plane + place, mask=inside, other=0.0)
    weighteds = tl.load(partials + 3 * plane + place, mask=inside, other=0.0)
    ids = tl.load(partial_ids + place, mask=inside, other=2147483647)

    top = tl.max(tops, 0)
    top_id = tl.min(tl.where(tops == top, ids, 2147483647), 0)
    second = tl.max(tl.where(ids == top_id, seconds, tops), 0)
    # Moves a block's sums from its own largest logit to the row's; an impossible block has sums of 0.
    after = tl.where(tops == -float("inf"), 0.0, tops - top)
    scale = tl.exp(after)
    total = tl.sum(scale * totals, 0)
    # Far below the top, after * totals may overflow to -inf, and a scale of 0 would make it NaN.
    weighted = tl.sum(tl.where(scale == 0.0, 0.0, scale * (weighteds + after * totals)), 0)
    # A total of NaN means that the row is no distribution: it passes to every float.
    top = tl.where(total == total, top, total)
    second = tl.where(total == total, second, total)

    token = tl.load(tokens + row, mask=row < n_tokens, other=-1).to(tl.int64)
    known = (token >= 0) & (token < vocabulary)
    start = logits + row.to(tl.int64) * row_stride
    own = tl.load(start + token * column_stride, mask=known, other=0.0).to(tl.float32)
    log_ratio = tl.where(known, own, float("nan")) - top

    tl.store(floats + row, top)
    tl.store(floats + rows + row, top + tl.log(total))
    tl.store(floats + 2 * rows + row, tl.log(total) - weighted / total)
    tl.store(floats + 3 * rows + row, second)
    tl.store(floats + 4 * rows + row, log_ratio)
    tl.store(argmax + row, top_id.to(tl.int64))


def logit_statistics_fused(logits: Tensor, tokens: Tensor, block: int | None = None) -> LogitStatistics:
    """The same as ``logit_statistics`` by the kernels of this module; at least one row, arguments checked before.

    Args:
        block: logits that one program reads, a power of two; by default what fills the GPU.
    """
    rows, vocabulary = logits.shape
    n_tokens = tokens.shape[0]
    if block is None:
        block = block_size(rows, vocabulary, processors(logits.device))
    blocks = triton.cdiv(vocabulary, block)
    partials = logits.new_empty(4, rows, blocks, dtype=torch.float32)
    partial_ids = logits.new_empty(rows, blocks, dtype=torch.int32)
    floats = logits.new_empty(5, rows, dtype=torch.float32)
    argmax = logits.new_empty(rows, dtype=torch.int64)
    layout = (logits.stride(0), logits.stride(1), vocabulary)
    with torch.cuda.device_of(logits):
        read_blocks[(rows, blocks)](
            logits,
            *layout,
            partials,
            partial_ids,
            BLOCK=block,
            num_warps=max(block // LOGITS_PER_WARP, 1),
        )
        merge_blocks[(rows,)](
            partials,
            partial_ids,
            blocks,
            logits,
            *layout,
            tokens.contiguous(),
            n_tokens,
            floats,
            argmax,
            BLOCKS=triton.next_power_of_2(blocks),
            num_warps=1,  # rows are few and blocks at most some hundreds: shuffles, no shared memory
        )
    maximum, log_sum_exp, entropy, second, log_ratio = floats
    return LogitStatistics(maximum, log_sum_exp, argmax, entropy, second, log_ratio[:n_tokens])


def block_size(rows: int, vocabulary: int, n_processors: int) -> int:
    """Logits a program reads: the widest block that still gives every multiprocessor its programs.

    Example:
        >>> [block_size(rows, 151_936, 132) for rows in (1, 4, 8, 64)]
        [1024, 2048, 4096, 4096]
    """
    block = WIDEST_BLOCK
    while block > NARROWEST_BLOCK and rows * -(-vocabulary // block) < PROGRAMS_PER_PROCESSOR * n_processors:
        block //= 2
    return block


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count
