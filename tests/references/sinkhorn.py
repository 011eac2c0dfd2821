"""Float64 Sinkhorn from the definition: scaling vectors u and v element by element, and their logarithms."""

import numpy as np


def notes_form(scores, iterations):
    """u_k = (B / K) / sum_b P_kb v_b; v_b = 1 / sum_k u_k P_kb on P = exp(scores).T, as the notes write it."""
    p = np.exp(np.asarray(scores, np.float64)).T
    prototypes, samples = p.shape
    v = np.ones(samples)
    for _ in range(iterations):
        u = np.array([(samples / prototypes) / sum(p[k, b] * v[b] for b in range(samples)) for k in range(prototypes)])
        v = np.array([1 / sum(u[k] * p[k, b] for k in range(prototypes)) for b in range(samples)])
    return u, v, (u[:, None] * p * v).T


def official_loop(scores, iterations):
    """facebookresearch/dinov2:dinov2/loss/dino_clstoken_loss.py sinkhorn_knopp_teacher, in float64."""
    q = np.exp(np.asarray(scores, np.float64)).T
    k, b = q.shape
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(axis=1, keepdims=True)
        q /= k
        q /= q.sum(axis=0, keepdims=True)
        q /= b
    return (q * b).T


def log_scaling(scores, r, c, iterations=None, tolerance=None, limit=100_000):
    """(f, g, plan, error, rounds) for positive marginals; logaddexp keeps it finite at any score."""
    scores = np.asarray(scores, np.float64)
    log_r, log_c = np.log(np.asarray(r, np.float64)), np.log(np.asarray(c, np.float64))
    f = np.zeros(len(scores))
    error, rounds = np.inf, 0
    while rounds < (iterations or limit) and (tolerance is None or error > tolerance):
        rounds += 1
        g = log_c - np.logaddexp.reduce(scores + f[:, None], axis=0)
        f = log_r - np.logaddexp.reduce(scores + g, axis=1)
        plan = np.exp(scores + f[:, None] + g)
        error = np.abs(plan.sum(axis=0) - np.exp(log_c)).sum()
    return f, g, plan, error, rounds
