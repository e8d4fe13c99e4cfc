"""The distillation losses the slow way: sums over single numbers. Gradients by derivatives worked out on paper."""

from __future__ import annotations

import math


def imitation_loss(student, teacher, mask, alpha_fg, alpha_bg, valid=None):
    """student, teacher: [n][c][y][x] nested lists; mask, valid: [n][y][x]. Returns fg, bg and their gradients."""
    images, channels, height, width = len(student), len(student[0]), len(student[0][0]), len(student[0][0][0])
    cells = [
        (n, y, x) for n in range(images) for y in range(height) for x in range(width) if valid is None or valid[n][y][x]
    ]
    results = []
    for alpha, share in ((alpha_fg, lambda m: float(m)), (alpha_bg, lambda m: 1 - float(m))):
        number = channels * sum(share(mask[n][y][x]) for n, y, x in cells)
        gradient = [[[[0.0] * width for _ in range(height)] for _ in range(channels)] for _ in range(images)]
        loss = 0.0
        for n, y, x in cells if number > 0 else []:
            for c in range(channels):
                difference = student[n][c][y][x] - teacher[n][c][y][x]
                loss += alpha / (2 * number) * share(mask[n][y][x]) * difference**2
                gradient[n][c][y][x] = alpha / number * share(mask[n][y][x]) * difference
        results.append((loss, gradient))
    (fg, fg_gradient), (bg, bg_gradient) = results
    return fg, bg, fg_gradient, bg_gradient


def softmax(logits):
    top = max(logits)
    exponentials = [math.exp(z - top) for z in logits]
    return [e / sum(exponentials) for e in exponentials]


def sigmoid(z):
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def entropy_of(p, q):
    """p log(p / q) with 0 log 0 = 0."""
    return p * math.log(p / q) if p > 0 else 0.0


def softmax_kl(student, teacher, temperature):
    """One region's term, and its gradient in the student's logits, which is T (softmax(s/T) - softmax(t/T))."""
    s, t = softmax([z / temperature for z in student]), softmax([z / temperature for z in teacher])
    value = temperature**2 * sum(entropy_of(p, q) for p, q in zip(t, s, strict=True))
    return value, [temperature * (q - p) for p, q in zip(t, s, strict=True)]


def sigmoid_kl(student, teacher, temperature):
    value, gradient = 0.0, []
    for s, t in zip(student, teacher, strict=True):
        s, t = s / temperature, t / temperature
        value += entropy_of(sigmoid(t), sigmoid(s)) + entropy_of(sigmoid(-t), sigmoid(-s))
        gradient.append(temperature * (sigmoid(s) - sigmoid(t)))
    return temperature**2 * value, gradient


def region_loss(kl, student, teacher, chosen, beta, temperature):
    """One group: beta times the mean of the chosen regions' terms, and its gradient."""
    number = sum(chosen)
    loss, gradient = 0.0, [[0.0] * len(row) for row in student]
    for r in range(len(student)):
        if chosen[r]:
            value, slopes = kl(student[r], teacher[r], temperature)
            loss += beta * value / number
            gradient[r] = [beta * slope / number for slope in slopes]
    return loss, gradient
