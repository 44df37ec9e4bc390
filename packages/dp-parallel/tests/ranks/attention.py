"""Every attention against PyTorch's dense one: the largest error of outputs and gradients."""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist
import torch.nn.functional as F

from veilspan.parallel import Layout
from veilspan.parallel.attention import AllGatherKV, Ulysses, causal

HEADS = 8


def dense(query, key, value, window):
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    seen = (distance >= 0) & (distance < (window or length))
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen)


def largest_error(kind, layout, key_heads, window, dtype, value_width=8):
    rank, length = dist.get_rank(), layout.length
    torch.manual_seed(1)
    shapes = [(HEADS, 8), (key_heads, 8), (key_heads, value_width), (HEADS, value_width)]
    *whole, weight = (torch.randn(2, h, length, d, dtype=dtype) for h, d in shapes)
    reference = [x.clone().requires_grad_() for x in whole]
    query, key, value = reference
    expected = dense(query, key, value, window)
    (expected * weight).sum().backward()
    mine = [layout.take(x, rank, 2).clone().requires_grad_() for x in whole]
    output = kind(layout=layout, group=dist.group.WORLD)(*mine, window=window)
    (output * layout.take(weight, rank, 2)).sum().backward()
    errors = [output - layout.take(expected, rank, 2)]
    errors += [x.grad - layout.take(y.grad, rank, 2) for x, y in zip(mine, reference, strict=True)]
    return max(error.abs().max().item() for error in errors)


def body() -> dict[str, float]:
    causal.BLOCK_ROWS = 5  # several, and uneven, blocks at test size
    ranks = dist.get_world_size()
    errors: dict[str, float] = {}
    for kind, layout_kind, key_heads, window, dtype in itertools.product(
        (Ulysses, AllGatherKV),
        ("contiguous", "zigzag"),
        (8, 4, 2, 1),
        (None, 11, 1000),
        (torch.float64, torch.float32),
    ):
        layout = Layout(length=16 * ranks, ranks=ranks, kind=layout_kind)
        name = f"{kind.__name__} {layout_kind} {key_heads} {window} {dtype}"
        errors[name] = largest_error(kind, layout, key_heads, window, dtype)
    for kind in (Ulysses, AllGatherKV):
        layout = Layout(length=16 * ranks, ranks=ranks, kind="zigzag")
        name = f"{kind.__name__} wide values"
        errors[name] = largest_error(kind, layout, 4, None, torch.float64, value_width=12)
    return errors
