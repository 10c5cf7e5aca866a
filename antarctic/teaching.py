"""A name from a few photos: the direction in CLIP's space in which they differ from other photos.

The mean of the photos alone also lies near to all that is of their class. A linear discriminant
(Fisher 1936, https://doi.org/10.1111/j.1469-1809.1936.tb02137.x) takes the others' spread away: w =
S^-1 (p - mean), where S is the covariance of other photos, shrunk towards a sphere since there are
few (Ledoit and Wolf 2004, https://doi.org/10.1016/S0047-259X(03)00096-4). Nothing is trained; those
who did so on the same task are MyVLM (https://arxiv.org/abs/2403.14599) and Yo'LLaVA
(https://arxiv.org/abs/2406.09400).

All arrays are NumPy's; sums are in float64.
"""

from typing import NamedTuple

import numpy as np

SHRINKAGE = 0.1  # of a covariance to its mean variance, where others are many
MANY = 3  # others for each dimension
FOLDS = 5  # parts of the others, each scored by a covariance that has not seen it
WRONGLY = 0.025  # share of the others that may be given the name
LEAST_WAY = 0.3  # but the name begins no nearer to the others' mean, on the way to the photos
LOSS = 0.3  # of that way, which a thing loses beside other things
LEAST_ROOM = 0.2  # between threshold and typical score, in parts of the threshold


class Spread(NamedTuple):
    """The others' mean (dim,) and their covariance (dim, dim), float64, shrunk by share."""

    mean: np.ndarray
    covariance: np.ndarray
    share: float


class Lesson(NamedTuple):
    """What photos taught. Scores are (x - mean) @ w: 0 at the others' mean."""

    w: np.ndarray  # (dim,) float64
    own: np.ndarray  # (photos,): each one's score by the w of the others of them
    others: np.ndarray  # (others,): each one's score by a covariance that has not seen it
    threshold: float  # from which an image gets the name
    typical: float  # the score of a photo, less what a thing loses beside other things


def spread_of(vectors, share=None):
    """The Spread of other photos. vectors: (n, dim), n >= 2. share: of the sphere in the
    covariance (default: SHRINKAGE, of few vectors what Ledoit and Wolf say, if that is more)."""
    vectors = np.asarray(vectors, np.float64)
    n, dim = vectors.shape
    mean = vectors.mean(0)
    centred = vectors - mean
    covariance = centred.T @ centred / n  # (dim, dim)
    variance = covariance.trace() / dim
    if share is None:
        share = SHRINKAGE
        if n < MANY * dim:
            share = max(share, ledoit_wolf(centred, covariance, variance))
    covariance *= 1 - share
    covariance[np.diag_indices(dim)] += share * variance + 1e-12
    return Spread(mean, covariance, share)


def ledoit_wolf(centred, covariance, variance):
    """The share of a sphere that brings a covariance of few rows nearest to the true one, by
    equation 14 of Ledoit and Wolf. centred: (n, dim)."""
    n, dim = centred.shape
    distance = (covariance ** 2).sum() - dim * variance ** 2
    # The mean squared distance of each row's own product to the covariance.
    noise = ((centred ** 2).sum(1) ** 2).sum() / n - (covariance ** 2).sum()
    return float(np.clip(noise / n / max(distance, 1e-300), 0, 1))


def directions(spread, photos, apart=()):
    """S'^-1 (photo - mean) of each photo, float64 (m, dim): their mean is w, since it is linear.

    photos: (m, dim). apart: means (q, dim) of what must not get the name. They are added to the
    covariance, so that w does not run along them: S' = S + sum of (m - mean)(m - mean)^T.
    """
    away = np.asarray(apart, np.float64).reshape(-1, len(spread.mean)) - spread.mean
    covariance = spread.covariance + away.T @ away
    return np.linalg.solve(covariance, (np.asarray(photos, np.float64) - spread.mean).T).T


def bias_direction(spread):
    """u, float64 (dim,), with x @ u near 1 for every image x: a row without a bias of its own gets
    one by it."""
    mean = spread.mean
    u = np.linalg.solve(spread.covariance + np.outer(mean, mean), mean)
    return u / (mean @ u)


def left_one_out(spread, photos, solved):
    """The score of each photo by the w of all others of them, (m,). solved: of directions()."""
    m = len(photos)
    centred = np.asarray(photos, np.float64) - spread.mean
    products = centred @ solved.T  # (m, m)
    return (products.sum(1) - products.diagonal()) / max(1, m - 1)


def parts_of(others, share):
    """[(which of the others are in a part, the Spread of all that are not)], FOLDS of them."""
    others, fold = np.asarray(others, np.float64), np.arange(len(others)) % FOLDS
    return [(fold == part, spread_of(others[fold != part], share)) for part in range(FOLDS)]


def unseen_scores(others, parts, photos, apart=()):
    """The scores of other photos, (n,), each by a w whose covariance has not seen it. parts: of
    parts_of()."""
    scores = np.empty(len(others))
    for inside, spread in parts:
        w = directions(spread, photos, apart).mean(0)
        scores[inside] = (others[inside] - spread.mean) @ w
    return scores


def learn(spread, others, parts, photos, apart=()):
    """A Lesson. spread: of others (n, dim); parts: of parts_of(), the same for all things. photos:
    (m, dim), of one thing. apart: see directions()."""
    solved = directions(spread, photos, apart)
    own = left_one_out(spread, photos, solved)
    scores = unseen_scores(others, parts, photos, apart)
    way = own.mean()
    threshold = max(np.quantile(scores, 1 - WRONGLY), LEAST_WAY * way)
    typical = max(way - LOSS * way, (1 + LEAST_ROOM) * threshold)
    return Lesson(solved.mean(0), own, scores, float(threshold), float(typical))


def learn_all(others, things):
    """(Spread, [a Lesson of each thing]), each thing apart from all others.

    others: (n, dim). things: pairs of photos (m, dim) and what photos (q, dim) it is not.
    """
    spread = spread_of(others)
    parts, lessons = parts_of(others, spread.share), []
    for i, (photos, unlike) in enumerate(things):
        apart = [other.mean(0) for j, (other, _) in enumerate(things) if j != i]
        lessons.append(learn(spread, others, parts, photos, [*apart, *unlike]))
    return spread, lessons


def row_of(spread, lesson, least, most):
    """v, float32 (dim,): the row of a cache that stands for what was taught.

    least: the score of an entry that is just in a table; an image at the lesson's threshold has it.
    most: that of the first entry; an image at the lesson's typical score has it. So v = a w + b u.
    """
    a, b = scale(lesson, least, most)
    return (a * lesson.w + (b - a * (spread.mean @ lesson.w)) * bias_direction(spread)).astype(
        np.float32)


def scale(lesson, least, most):
    """(a, b): a score s of a lesson is a s + b among the scores of a table's entries."""
    a = (most - least) / (lesson.typical - lesson.threshold)
    return a, least - a * lesson.threshold
