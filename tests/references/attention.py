"""Attention query by query in float64: the list of the keys that each query sees, and the chain rule by hand."""

import numpy as np


def sees(b, n, t, s, mask, causal, segments, offsets):
    """Whether query t of head n in example b sees key s; mask [B, N, T, S], segments [B, T] and [B, S], offsets [B]."""
    if mask is not None and not mask[b, n, t, s]:
        return False
    if causal and s > t + offsets[b]:
        return False
    return segments is None or segments[0][b, t] == segments[1][b, s]


def attention(query, key, value, cotangent, scale, bias=None, **rules):
    """[B, T, N, H], [B, S, K, H] twice, [B, T, N, H] -> output, gradients of query, key, value, bias [B, N, T, S]."""
    query, key, value, cotangent = (np.asarray(x, np.float64) for x in (query, key, value, cotangent))
    batch, length, heads, _ = query.shape
    group = heads // key.shape[2]
    out = np.zeros_like(query)
    bias = np.zeros((batch, heads, length, key.shape[1])) if bias is None else bias
    gradients = [np.zeros_like(x) for x in (query, key, value, bias)]
    for b in range(batch):
        for n in range(heads):
            for t in range(length):
                seen = [s for s in range(key.shape[1]) if sees(b, n, t, s, **rules)]
                if not seen:
                    continue
                keys, values = key[b, seen, n // group], value[b, seen, n // group]
                logits = scale * keys @ query[b, t, n] + bias[b, n, t, seen]
                weights = np.exp(logits - logits.max())
                weights /= weights.sum()
                out[b, t, n] = weights @ values
                to_weights = values @ cotangent[b, t, n]
                to_logits = weights * (to_weights - weights @ to_weights)
                gradients[0][b, t, n] = scale * to_logits @ keys
                gradients[1][b, seen, n // group] += scale * np.outer(to_logits, query[b, t, n])
                gradients[2][b, seen, n // group] += np.outer(weights, cotangent[b, t, n])
                gradients[3][b, n, t, seen] += to_logits
    return out, *gradients
