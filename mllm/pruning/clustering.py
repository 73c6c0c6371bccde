"""Clusters around peaks of density: tensors in, tensors out.

After Rodriguez and Laio, "Clustering by fast search and find of density peaks", Science 2014, and its form over
nearest neighbours by Du, Ding and Jia, Knowledge-Based Systems 2016.
"""

from dataclasses import dataclass

import torch

from mllm.shapes import Float, Int, Tensor


@dataclass(frozen=True)
class Clusters:
    """Points in groups.

    Args:
        centres: Which points the groups stand around, the highest peak first.
        joined: Of each point, in which group it is.
    """

    centres: Int[Tensor, " c"]
    joined: Int[Tensor, " n"]


def density_peaks(points: Float[Tensor, "n D"], count: int) -> Clusters:
    """Groups around points that are dense and far from any denser one.

    A point's density is exp(-m), m the mean of its squared distances to its `count` nearest points, itself among
    them. Its peak is its density times the distance to the nearest denser point; for the densest, to the farthest two
    points' distance. The highest peaks are centres; every other point joins the centre nearest to it. Distances are
    divided by the square root of the width. Of equally dense points the first is the denser.

    Args:
        points: To be grouped.
        count: How many groups, from 1 to the number of points.
    """
    distances = _distances(points)
    # As logarithms: exp(-m) of hidden states is zero in float32.
    densities = -distances.sort(dim=1).values[:, :count].square().mean(dim=1)
    order = torch.sort(densities, descending=True, stable=True).indices
    rank = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    is_denser = rank[None, :] < rank[:, None]
    to_denser = distances.where(is_denser, distances.max()).min(dim=1).values
    peaks = densities + to_denser.log()
    centres = torch.sort(peaks, descending=True, stable=True).indices[:count]
    joined = distances[:, centres].argmin(dim=1)
    joined[centres] = torch.arange(count, device=centres.device)
    return Clusters(centres, joined)


def _distances(points: Float[Tensor, "n D"]) -> Float[Tensor, "n n"]:
    values = points.to(torch.promote_types(points.dtype, torch.float32)) / points.shape[1] ** 0.5
    return torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist")
