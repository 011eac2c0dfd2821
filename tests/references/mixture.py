"""A mixture of experts in NumPy (float64), token by token."""

import numpy as np


def silu(x):
    return x / (1 + np.exp(-x))


def pairs(chosen, experts):
    """(token, which of its choices, expert) of all choices that have a kernel."""
    for token, row in enumerate(chosen):
        for place, expert in enumerate(row):
            if 0 <= expert < experts:
                yield token, place, expert


def mixture(x, weights, chosen, gate, up, down):
    x, weights, gate, up, down = (np.float64(array) for array in (x, weights, gate, up, down))
    out = np.zeros_like(x)
    for token, place, expert in pairs(chosen, len(gate)):
        hidden = silu(x[token] @ gate[expert]) * (x[token] @ up[expert])
        out[token] += weights[token, place] * (hidden @ down[expert])
    return out


def gradients(x, weights, chosen, gate, up, down, cotangent):
    """Of sum(cotangent · mixture) by tokens, weights and the three kernels."""
    arrays = [np.float64(array) for array in (x, weights, gate, up, down)]
    x, weights, gate, up, down = arrays
    of_x, of_weights, of_gate, of_up, of_down = map(np.zeros_like, arrays)
    for token, place, expert in pairs(chosen, len(gate)):
        a, b = x[token] @ gate[expert], x[token] @ up[expert]
        sigmoid = 1 / (1 + np.exp(-a))
        hidden, given = a * sigmoid * b, np.float64(cotangent[token])
        of_weights[token, place] = hidden @ down[expert] @ given
        given = given * weights[token, place]
        of_down[expert] += np.outer(hidden, given)
        back = down[expert] @ given
        of_a = back * b * (sigmoid + a * sigmoid * (1 - sigmoid))
        of_b = back * a * sigmoid
        of_gate[expert] += np.outer(x[token], of_a)
        of_up[expert] += np.outer(x[token], of_b)
        of_x[token] += gate[expert] @ of_a + up[expert] @ of_b
    return of_x, of_weights, of_gate, of_up, of_down
