"""The rivals' losses the slow way: loops over single numbers, nested lists in, one number out.

Gradients need no derivative worked out: every formula here is written with + - * / exp log sqrt, so it can be followed
along an imaginary step. The imaginary part of f(x + ih) over h is f'(x) to the last digit, for nothing is subtracted.
"""

from __future__ import annotations

import cmath
import itertools

STEP = 1e-40


def value_and_gradient(loss, student):
    """loss: nested lists -> number or tuple of numbers. Returns each number with its gradient in `student`."""
    values = _tuple(loss(student))
    gradients = [_copy(student) for _ in values]
    steps = _copy(student)
    for place in _places(student):
        original = _get(steps, place)
        _set(steps, place, original + 1j * STEP)
        for gradient, value in zip(gradients, _tuple(loss(steps)), strict=True):
            _set(gradient, place, complex(value).imag / STEP)
        _set(steps, place, original)
    return [(complex(value).real, gradient) for value, gradient in zip(values, gradients, strict=True)]


def pkd(student, teacher, valid=None):
    channels, cells = len(teacher[0]), _cells(teacher, valid)
    total = 0
    for c in range(channels):
        z_student, z_teacher = (_standard_scores([x[n][c][i][j] for n, i, j in cells]) for x in (student, teacher))
        total += sum((s - t) ** 2 for s, t in zip(z_student, z_teacher, strict=True))
    return total / (2 * channels * len(cells))


def _standard_scores(values):
    mean = sum(values) / len(values)
    variance = sum((x - mean) ** 2 for x in values) / max(len(values) - 1, 1)
    return [(x - mean) / (_root(variance) + 1e-6) for x in values]


def resized(features, height, width):
    """Bilinear with half-pixel centres (align_corners False), edges repeated."""
    images, channels, rows, columns = _shape(features)

    def taps(target, length, size):
        place = min(max((target + 0.5) * length / size - 0.5, 0), length - 1)
        low = int(place)
        return low, min(low + 1, length - 1), place - low

    result = [[[[0] * width for _ in range(height)] for _ in range(channels)] for _ in range(images)]
    for n, c, i, j in itertools.product(range(images), range(channels), range(height), range(width)):
        top, bottom, down = taps(i, rows, height)
        left, right, across = taps(j, columns, width)
        m = features[n][c]
        upper = m[top][left] * (1 - across) + m[top][right] * across
        lower = m[bottom][left] * (1 - across) + m[bottom][right] * across
        result[n][c][i][j] = upper * (1 - down) + lower * down
    return result


def cwd(student, teacher, temperature=1.0, valid=None):
    images, channels, _, _ = _shape(teacher)
    total = 0
    for n in range(images):
        cells = [(i, j) for m, i, j in _cells(teacher, valid) if m == n]
        for c in range(channels):
            p = softmax([teacher[n][c][i][j] / temperature for i, j in cells])
            q = softmax([student[n][c][i][j] / temperature for i, j in cells])
            total += sum(pi * (cmath.log(pi) - cmath.log(qi)) for pi, qi in zip(p, q, strict=True))
    return temperature**2 * total / (images * channels)


def attention(features, temperature, valid=None):
    """{(n, i, j): spatial}, {(n, c): channel}."""
    images, channels, _, _ = _shape(features)
    spatial, channel = {}, {}
    for n in range(images):
        cells = [(m, i, j) for m, i, j in _cells(features, valid) if m == n]
        means = [sum(_absolute(features[n][c][i][j]) for c in range(channels)) / channels for _, i, j in cells]
        for cell, share in zip(cells, softmax([mean / temperature for mean in means]), strict=True):
            spatial[cell] = len(cells) * share
        means = [sum(_absolute(features[n][c][i][j]) for _, i, j in cells) / len(cells) for c in range(channels)]
        for c, share in enumerate(softmax([mean / temperature for mean in means])):
            channel[n, c] = channels * share
    return spatial, channel


def fgd_focal(student, teacher, fg, bg, temperature=0.5, valid=None):
    images, channels, _, _ = _shape(teacher)
    spatial, channel = attention(teacher, temperature, valid)
    totals = [0, 0]
    for (n, i, j), c in itertools.product(spatial, range(channels)):
        error = spatial[n, i, j] * channel[n, c] * (student[n][c][i][j] - teacher[n][c][i][j]) ** 2
        totals[0] += fg[n][i][j] * error
        totals[1] += bg[n][i][j] * error
    return totals[0] / images, totals[1] / images


def fgd_attention(student, teacher, temperature=0.5, valid=None):
    total = 0
    for ours, theirs in zip(
        attention(student, temperature, valid), attention(teacher, temperature, valid), strict=True
    ):
        total += sum(_absolute(ours[place] - theirs[place]) for place in ours)
    return total / len(teacher)


def focal_masks(boxes, height, width, stride, valid=None):
    """One image, one level: (fg, bg) as [row][column]; boxes are whole-number xyxy."""
    fg = [[0.0] * width for _ in range(height)]
    for x1, y1, x2, y2 in boxes:
        rows = [i for i in range(height) if y1 // stride <= i < max(y2 // stride, y1 // stride + 1)]
        columns = [j for j in range(width) if x1 // stride <= j < max(x2 // stride, x1 // stride + 1)]
        for i, j in itertools.product(rows, columns):
            fg[i][j] = max(fg[i][j], 1 / (len(rows) * len(columns)))
    outside = [(i, j) for i in range(height) for j in range(width) if fg[i][j] == 0 and (valid is None or valid[i][j])]
    bg = [[1 / len(outside) if (i, j) in outside else 0.0 for j in range(width)] for i in range(height)]
    return fg, bg


def relation(features, parameters, valid=None):
    """x + W2 relu(LN(W1 ctx)), ctx the mean of x weighted by softmax over cells of a 1x1 convolution."""
    context, down, norm, up = (parameters[name] for name in ("context", "down", "norm", "up"))
    images, channels, height, width = _shape(features)
    result = _copy(features)
    for n in range(images):
        cells = [(i, j) for m, i, j in _cells(features, valid) if m == n]
        x = features[n]
        logits = [sum(context[0][c] * x[c][i][j] for c in range(channels)) + context[1] for i, j in cells]
        shares = softmax(logits)
        ctx = [sum(share * x[c][i][j] for share, (i, j) in zip(shares, cells, strict=True)) for c in range(channels)]
        hidden = [sum(w * v for w, v in zip(row, ctx, strict=True)) + b for row, b in zip(*down, strict=True)]
        mean = sum(hidden) / len(hidden)
        variance = sum((h - mean) ** 2 for h in hidden) / len(hidden)
        hidden = [
            _positive((h - mean) / cmath.sqrt(variance + 1e-5) * g + b) for h, g, b in zip(hidden, *norm, strict=True)
        ]
        added = [sum(w * v for w, v in zip(row, hidden, strict=True)) + b for row, b in zip(*up, strict=True)]
        for c, i, j in itertools.product(range(channels), range(height), range(width)):
            result[n][c][i][j] = x[c][i][j] + added[c]
    return result


def conv3(features, weight, bias):
    """3x3 convolution, padding 1."""
    images, channels, height, width = _shape(features)
    result = [[[[b] * width for _ in range(height)] for b in bias] for _ in range(images)]
    for n, o, i, j in itertools.product(range(images), range(len(bias)), range(height), range(width)):
        for c, a, b in itertools.product(range(channels), range(3), range(3)):
            if 0 <= i + a - 1 < height and 0 <= j + b - 1 < width:
                result[n][o][i][j] += weight[o][c][a][b] * features[n][c][i + a - 1][j + b - 1]
    return result


def mgd(generated, teacher, valid=None):
    images, channels, _, _ = _shape(teacher)
    places = itertools.product(_cells(teacher, valid), range(channels))
    return sum((generated[n][c][i][j] - teacher[n][c][i][j]) ** 2 for (n, i, j), c in places) / images


def frs(student, teacher, score):
    images, channels, height, width = _shape(teacher)
    total, scores = 0, 0
    for n, i, j in itertools.product(range(images), range(height), range(width)):
        total += score[n][i][j] * sum((student[n][c][i][j] - teacher[n][c][i][j]) ** 2 for c in range(channels))
        scores += score[n][i][j]
    return total / scores if scores > 0 else 0 * student[0][0][0][0]


def frs_class(student, teacher, score):
    images, channels, height, width = _shape(teacher)
    total, scores = 0, 0
    for n, i, j in itertools.product(range(images), range(height), range(width)):
        pairs = [(student[n][c][i][j], sigmoid(teacher[n][c][i][j])) for c in range(channels)]
        total += score[n][i][j] * sum(cross_entropy(x, target) for x, target in pairs)
        scores += score[n][i][j]
    return total / scores if scores > 0 else 0 * student[0][0][0][0]


def dist(student, teacher, valid=None):
    rows = [r for r in range(len(student)) if valid is None or valid[r]]
    if not rows:
        return 0, 0
    columns = range(len(student[0]))
    by_row = [correlation(student[r], teacher[r]) for r in rows]
    by_column = [correlation([student[r][k] for r in rows], [teacher[r][k] for r in rows]) for k in columns]
    return 1 - sum(by_row) / len(by_row), 1 - sum(by_column) / len(by_column)


def correlation(ours, theirs):
    mean, their_mean = sum(ours) / len(ours), sum(theirs) / len(theirs)
    a, b = [x - mean for x in ours], [x - their_mean for x in theirs]
    lengths = _root(sum(x * x for x in a)) * _root(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / (lengths + 1e-8)


def crosskd_class(cross, teacher, weights, positives, beta=1.0):
    total = 0
    for xs, ts, weight in zip(cross, teacher, weights, strict=True):
        for x, t in zip(xs, ts, strict=True):
            total += weight * cross_entropy(x, sigmoid(t)) * _absolute(sigmoid(x) - sigmoid(t)) ** beta
    return total / (positives or 1)


def crosskd_box(cross, teacher, weights, positives):
    return sum(w * (1 - giou(a, b)) for a, b, w in zip(cross, teacher, weights, strict=True)) / (positives or 1)


def giou(a, b):
    def area(box):
        return _positive(box[2] - box[0]) * _positive(box[3] - box[1])

    common = area([_largest(a[0], b[0]), _largest(a[1], b[1]), -_largest(-a[2], -b[2]), -_largest(-a[3], -b[3])])
    hull = area([-_largest(-a[0], -b[0]), -_largest(-a[1], -b[1]), _largest(a[2], b[2]), _largest(a[3], b[3])])
    union = area(a) + area(b) - common
    return (common / union if union != 0 else 0) - ((hull - union) / hull if hull != 0 else 0)


def softmax(logits):
    top = max(complex(x).real for x in logits)
    powers = [cmath.exp(x - top) for x in logits]
    return [power / sum(powers) for power in powers]


def sigmoid(x):
    return 1 / (1 + cmath.exp(-x))


def cross_entropy(logit, target):
    return -target * cmath.log(sigmoid(logit)) - (1 - target) * cmath.log(sigmoid(-logit))


def _absolute(x):
    """|x|, whose slope at 0 counts as 0."""
    return x if complex(x).real > 0 else -x if complex(x).real < 0 else 0


def _positive(x):
    return x if complex(x).real > 0 else 0


def _largest(x, y):
    return x if complex(x).real > complex(y).real else y


def _root(x):
    """Square root, whose slope at 0 counts as 0; what is left of a step squared is 0."""
    return cmath.sqrt(x) if complex(x).real > STEP else 0


def _cells(features, valid):
    images, _, height, width = _shape(features)
    places = itertools.product(range(images), range(height), range(width))
    return [(n, i, j) for n, i, j in places if valid is None or valid[n][i][j]]


def _shape(features):
    return len(features), len(features[0]), len(features[0][0]), len(features[0][0][0])


def _tuple(values):
    return values if isinstance(values, tuple) else (values,)


def _copy(nested):
    return [_copy(inner) for inner in nested] if isinstance(nested, list) else nested


def _places(nested, prefix=()):
    if not isinstance(nested, list):
        yield prefix
        return
    for index, inner in enumerate(nested):
        yield from _places(inner, (*prefix, index))


def _get(nested, place):
    for index in place:
        nested = nested[index]
    return nested


def _set(nested, place, value):
    _get(nested, place[:-1])[place[-1]] = value
