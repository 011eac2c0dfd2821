"""The vision encoder of Qwen2.5-VL and that of the notes in NumPy (float64), patch by patch with dense masks.

Written from shared/spec/qwen_vl.md, sections 1.1 and 2.3 to 2.5.
"""

import math

import numpy as np


def layout(grids):
    """(frame, row, column) of every patch: frames, then 2x2 blocks row by row, then the patches of a block."""
    places, frame = [], 0
    for time, height, width in grids:
        for _ in range(time):
            for y in range(0, height, 2):
                for x in range(0, width, 2):
                    places += [(frame, y + dy, x + dx) for dy in (0, 1) for dx in (0, 1)]
            frame += 1
    return np.array(places)


def window_of(places, window, shift):
    """Which window each patch is in, as (frame, window row, window column)."""
    return np.column_stack([places[:, :1], (places[:, 1:] + window - shift) // window])


def encoder(params, patches, grids, *, heads, window, full, shifted=False, every=0, carry=False):
    """Features of the merged patches; `params` as those of models/qwen_vl/vision.py, unrolled."""
    places = layout(grids)
    frames = places[:, 0].max() + 1
    x = patches @ params["patch_embed"]["kernel"]
    count = len(x)
    if every:
        x = np.concatenate([x, np.zeros((frames, x.shape[1]))])
    frame = np.concatenate([places[:, 0], np.arange(frames)]) if every else places[:, 0]
    number = 0  # of windowed blocks so far
    for i in range(len(params["encoder"])):
        block = params["encoder"][f"blocks_{i}"]
        if every and i % every == 0:
            x[count:] = params["global_query"][i // every] + (x[count:] if carry else 0)
        mask = frame[:, None] == frame[None]
        if i not in full:
            windows = window_of(places, window, window // 2 if shifted and number % 2 else 0)
            same = np.ones_like(mask)
            same[:count, :count] = (windows[:, None] == windows[None]).all(-1)
            mask &= same
            number += 1
        x = x + attend(block["attn"], rms(x, block["norm1"]["scale"]), places, mask, heads)
        y, mlp = rms(x, block["norm2"]["scale"]), block["mlp"]
        gate = dense(mlp["gate"], y)
        x = x + dense(mlp["fc2"], gate / (1 + np.exp(-gate)) * dense(mlp["fc1"], y))
    merged = rms(x[:count], params["merger_norm"]["scale"]).reshape(count // 4, -1)
    hidden = dense(params["merger_fc1"], merged)
    return dense(params["merger_fc2"], hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))))


def attend(params, x, places, mask, heads):
    size = x.shape[1] // heads
    rates = 10_000.0 ** (-2 * np.arange(size // 4) / (size / 2))
    angles = np.zeros((len(x), size // 2))  # global queries are not turned
    angles[: len(places)] = np.concatenate([places[:, 1:2] * rates, places[:, 2:3] * rates], axis=1)
    cos, sin = (np.concatenate([f(angles)] * 2, axis=1) for f in (np.cos, np.sin))
    out = params["out"]["bias"].copy()
    for head in range(heads):
        query, key, value = (
            x @ params[name]["kernel"][:, head] + params[name]["bias"][head] for name in ("query", "key", "value")
        )
        query, key = (
            y * cos + np.concatenate([-y[:, size // 2 :], y[:, : size // 2]], axis=1) * sin for y in (query, key)
        )
        logits = np.where(mask, query @ key.T / math.sqrt(size), -np.inf)
        weights = np.exp(logits - logits.max(1, keepdims=True))
        out = out + weights / weights.sum(1, keepdims=True) @ value @ params["out"]["kernel"][head]
    return out


def rms(x, scale):
    return x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6) * scale


def dense(params, x):
    return x @ params["kernel"] + params["bias"]
