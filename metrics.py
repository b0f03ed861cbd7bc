"""Scores of samples beside real images: numpy alone, one function for each paper's equations.

Features, real and fake, are float32 (N, D) of one extractor.  evaluate.py puts them together.
"""

import math

import numpy as np

K = 5  # neighbours that make a radius, for precision, recall, density and coverage


def moments(features):
    """Mean (D,) and covariance (D, D) of features (N, D), in float64."""
    features = features.astype(np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False)


def frechet_distance(mean_a, cov_a, mean_b, cov_b):
    """The squared Frechet distance of two Gaussians, Heusel et al. 2017 (arXiv:1706.08500) eq. (6).

    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)).  The product has the same
    eigenvalues as the symmetric cov_a^(1/2) cov_b cov_a^(1/2), whose square roots are real: no
    general matrix root is needed.
    """
    values, vectors = np.linalg.eigh(cov_a)
    root_a = vectors * np.sqrt(values.clip(0)) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(0)
    distance = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b)
    return float(distance - 2 * np.sqrt(eigenvalues).sum())


def squared_distances(a, b):
    """float32 (len(a), len(b)) of the rows of a and b, by one matrix product."""
    products = a @ b.T
    products *= -2
    products += (a * a).sum(axis=1)[:, None]
    products += (b * b).sum(axis=1)
    return np.maximum(products, 0, out=products)


def in_blocks(rows, size=500):
    """Slices of at most `size` rows, so that their distances to all columns fit into memory."""
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


def neighbour_radii(x, k=K):
    """The squared distance of each row to its k-th nearest other row: float32 (N,)."""
    radii = np.empty(len(x), np.float32)
    for rows in in_blocks(len(x)):
        squares = squared_distances(x[rows], x)
        squares[np.arange(len(squares)), np.arange(rows.start, rows.stop)] = np.inf
        radii[rows] = np.partition(squares, k - 1, axis=1)[:, k - 1]
    return radii


def manifold_scores(real, real_radii, fake, k=K):
    """Precision, recall, density and coverage of fake (M, D) beside real (N, D).

    Each point has a ball that reaches to its k-th neighbour; real_radii: of neighbour_radii.
    Kynkaanniemi et al. 2019 (arXiv:1904.06991) eqs. (1), (2): precision is the fraction of fakes
    inside a real ball, recall that of reals inside a fake ball.  Naeem et al. 2020
    (arXiv:2002.09797): density is the mean number of real balls around a fake, over k; coverage the
    fraction of real balls with a fake inside.  As in the code of the latter, the edge is outside.
    """
    fake_radii = neighbour_radii(fake, k)
    balls = np.zeros(len(fake), np.int64)
    recalled = 0
    covered = 0
    for rows in in_blocks(len(real)):
        squares = squared_distances(real[rows], fake)
        inside = squares < real_radii[rows, None]
        balls += inside.sum(axis=0)
        covered += inside.any(axis=1).sum()
        recalled += (squares < fake_radii).any(axis=1).sum()
    return {
        "precision": float((balls > 0).mean()),
        "recall": float(recalled / len(real)),
        "density": float(balls.mean() / k),
        "coverage": float(covered / len(real)),
    }


def class_scores(predicted, labels):
    """Scores of the classes int (N,) that the extractor sees, beside the requested ones.

    label_accuracy and accuracy_by_class: fraction seen as requested; labels are None where no class
    was requested.  histogram: fraction of each class; entropy: of the histogram, 1 is uniform, 0 a
    single class.
    """
    histogram = np.bincount(predicted, minlength=10) / len(predicted)
    present = histogram[histogram > 0]
    scores = {"label_accuracy": None}
    if labels is not None:
        right = np.bincount(labels[predicted == labels], minlength=10)
        requested = np.bincount(labels, minlength=10)
        scores["label_accuracy"] = float((predicted == labels).mean())
        scores["accuracy_by_class"] = (right / np.maximum(requested, 1)).tolist()
    scores["entropy"] = float(-(present * np.log(present)).sum() / math.log(10))
    scores["histogram"] = histogram.tolist()
    return scores


def as_pixels(images):
    """uint8 images (N, 1, 32, 32) -> float32 (N, 784) in [0, 1], without the border."""
    return images[:, 0, 2:30, 2:30].reshape(len(images), -1).astype(np.float32) / 255


def nearest(queries, references):
    """Squared distance to the nearest reference, float32 (N,), and its index, int64 (N,)."""
    squares = np.empty(len(queries), np.float32)
    indices = np.empty(len(queries), np.int64)
    for rows in in_blocks(len(queries)):
        block = squared_distances(queries[rows], references)
        indices[rows] = block.argmin(axis=1)
        squares[rows] = block.min(axis=1)
    return squares, indices


def copy_ratios(queries, train, test):
    """Distance to the nearest training image over that to the nearest test image: (N,).

    All training images are searched, since a copy of one that was left out would be missed.  They
    are more than the test images, so the ratio of a new image is below 1: compare it with the ratio
    of real images that are in neither set.
    """
    return np.sqrt(nearest(queries, train)[0] / np.maximum(nearest(queries, test)[0], 1e-6))
