"""Slow float64 twins of the self-distillation losses, written from the papers and the reference code, crop by crop."""

import numpy as np


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def sinkhorn_loop(logits, temperature, rounds=3):
    """The in-place loop of dinov2:dinov2/loss/dino_clstoken_loss.py, on a matrix already freed of padding."""
    scores = np.asarray(logits, np.float64) / temperature
    q = np.exp(scores - scores.max()).T
    prototypes, samples = q.shape
    q /= q.sum()
    for _ in range(rounds):
        q /= q.sum(1, keepdims=True)
        q /= prototypes
        q /= q.sum(0, keepdims=True)
        q /= samples
    return (q * samples).T


def dino(student, targets, temperature=0.1):
    """(global, local) over pairs; student [B, S, K], targets [B, G, K]."""
    targets = np.asarray(targets, np.float64)
    batch, crops, _ = targets.shape
    totals = [0.0, 0.0]
    pairs = 0
    for v in range(student.shape[1]):
        for q in range(crops):
            if v == q:
                continue
            pairs += 1
            loss = -np.mean([(targets[b, q] * log_softmax(student[b, v] / temperature)).sum() for b in range(batch)])
            totals[int(v >= crops)] += loss
    return totals[0] / pairs, totals[1] / pairs


def ibot(student, targets, masked, temperature=0.1):
    """student, targets [C, N, K]; masked [C, N]."""
    targets, losses = np.asarray(targets, np.float64), []
    for s, q, m in zip(student, targets, masked, strict=True):
        cross = [-(q[i] * log_softmax(s[i] / temperature)).sum() for i in range(len(m)) if m[i]]
        losses.append(sum(cross) / max(len(cross), 1))
    return np.mean(losses)


def koleo(x):
    x = np.asarray(x, np.float64)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-8)
    losses = []
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i] or [i]
        j = max(others, key=lambda j: x[i] @ x[j])
        losses.append(-np.log(np.linalg.norm(x[i] - x[j] + 1e-8) + 1e-8))
    return np.mean(losses)


def numerical_gradient(function, x, step=1e-6):
    gradient = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient
