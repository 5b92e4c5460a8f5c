"""Neighborhood attention as slow loops over numbers, written from the formula and sharing no code with foveal."""

import math

import torch


def window(x, length, kernel_size, stride, dilation, boundary, counted_by=None, offset=0):
    """[(position or None, table row)] of the keys of the query at x; None is a position outside the map. With
    ``counted_by``, the distance of queries, the table's rows count those that share a window one by one. Blocks of
    ``stride`` begin at its multiples plus ``offset``."""
    group, i = x % dilation, x // dilation
    members = [p for p in range(length) if p % dilation == group]
    first = i
    while (first - offset) % stride != 0:
        first -= 1
    lead = first + stride // 2
    left = kernel_size // 2
    right = kernel_size - 1 - left
    if boundary == "shift":
        lead = min(lead, len(members) - 1)
        while lead - left < 0:
            lead += 1
        while lead + right > len(members) - 1:
            lead -= 1
    if counted_by is not None:
        first = (i // stride) * stride
        i = first + len(range(first, i, counted_by))
    keys = []
    for t in range(lead - left, lead - left + kernel_size):
        keys.append((members[t] if 0 <= t < len(members) else None, t - i + kernel_size - 1))
    return keys


def attention(
    q,
    k,
    v,
    kernel_size,
    stride,
    dilation,
    boundary,
    table=None,
    factors=None,
    scale=None,
    query_stride=(1, 1),
    counted=False,
    offset=(0, 0),
):
    """k: [B, H, W, N, D], v: [B, H, W, N, V], q: [B, ., ., N, D] for every query_stride-th row and column of the map;
    all float64; loops over every query and key."""
    batch, height, width, heads, depth = k.shape
    scale = depth**-0.5 if scale is None else scale
    out = torch.zeros(*q.shape[:4], v.shape[-1], dtype=torch.float64)
    by = query_stride if counted else (None, None)
    for b in range(batch):
        for n in range(heads):
            for y in range(0, height, query_stride[0]):
                rows = window(y, height, kernel_size[0], stride[0], dilation[0], boundary, by[0], offset[0])
                for x in range(0, width, query_stride[1]):
                    columns = window(x, width, kernel_size[1], stride[1], dilation[1], boundary, by[1], offset[1])
                    place = b, y // query_stride[0], x // query_stride[1], n
                    query = q[place]
                    logits, values = [], []
                    for ky, row in rows:
                        for kx, column in columns:
                            outside = ky is None or kx is None
                            if outside and boundary == "mask":
                                continue
                            logit = 0.0 if outside else scale * float(query @ k[b, ky, kx, n])
                            if table is not None:
                                logit += float(table[n, row, column])
                            if factors is not None:
                                logit += float(query @ factors[0][row]) + float(query @ factors[1][column])
                            logits.append(logit)
                            values.append(torch.zeros_like(v[0, 0, 0, 0]) if outside else v[b, ky, kx, n])
                    top = max(logits)
                    weights = [math.exp(z - top) for z in logits]
                    total = sum(weights)
                    out[place] = sum(w / total * value for w, value in zip(weights, values, strict=True))
    return out


def aggregate(weights, v, kernel_size, dilation, boundary):
    """weights: [B, H, W, N, Kh * Kw], v: [B, H, W, N, D], both float64; loops over every query and key."""
    batch, height, width, heads, _ = v.shape
    out = torch.zeros_like(v)
    for y in range(height):
        rows = window(y, height, kernel_size[0], 1, dilation[0], boundary)
        for x in range(width):
            columns = window(x, width, kernel_size[1], 1, dilation[1], boundary)
            for b in range(batch):
                for n in range(heads):
                    for i, (ky, _) in enumerate(rows):
                        for j, (kx, _) in enumerate(columns):
                            if ky is not None and kx is not None:
                                out[b, y, x, n] += weights[b, y, x, n, i * kernel_size[1] + j] * v[b, ky, kx, n]
    return out


def logits(q, k, kernel_size, dilation, table=None):
    """q, k: [B, H, W, N, D], float64, boundary "shift" -> [B, H, W, N, Kh * Kw]."""
    batch, height, width, heads, _ = q.shape
    out = torch.zeros(batch, height, width, heads, kernel_size[0] * kernel_size[1], dtype=torch.float64)
    for y in range(height):
        rows = window(y, height, kernel_size[0], 1, dilation[0], "shift")
        for x in range(width):
            columns = window(x, width, kernel_size[1], 1, dilation[1], "shift")
            for b in range(batch):
                for n in range(heads):
                    for i, (ky, row) in enumerate(rows):
                        for j, (kx, column) in enumerate(columns):
                            logit = q[b, y, x, n] @ k[b, ky, kx, n]
                            bias = 0.0 if table is None else table[n, row, column]
                            out[b, y, x, n, i * kernel_size[1] + j] = logit + bias
    return out
