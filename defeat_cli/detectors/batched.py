"""Matching, sampling and filtering of boxes, and pooling, for all images of a batch at once.

torchvision does these image by image: hundreds of small operations, and on a GPU the host waits several times an image.
Here they are done together, from torchvision's own settings, and give its numbers: random draws are the same, in the
same order, so that boxes, labels and losses are equal to the last bit on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, Matcher
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import batched_nms, box_iou

MAX_ELEMENTS = 1 << 22
"""Pairs of boxes and candidates that are compared at once; images are taken together as far as it reaches."""


def resized_targets(
    targets: Sequence[dict[str, Any]],
    old: Sequence[tuple[int, int]],
    new: Sequence[tuple[int, int]],
    device: torch.device,
) -> list[dict[str, Any]]:
    """Targets of resized images on a device, to which all boxes and all labels go by one copy each.

    Args:
        targets: on the CPU as a rule, where `boxes` are resized before they travel; what else a target holds (its
            `image_id`, its `masks`) only goes to the device.
        old, new: (height, width) of each image.
    """
    counts = [len(target["boxes"]) for target in targets]
    down_across = torch.tensor(new, dtype=torch.float32) / torch.tensor(old, dtype=torch.float32)
    factors = down_across.flip(1).repeat(1, 2).repeat_interleave(torch.tensor(counts), dim=0)
    rows = {key: torch.cat([target[key] for target in targets]) for key in ("boxes", "labels") if key in targets[0]}
    rows["boxes"] = rows["boxes"] * factors.to(rows["boxes"].device, non_blocking=True)
    parts = {key: of_all.to(device, non_blocking=True).split(counts) for key, of_all in rows.items()}
    others = [target_on({key: value for key, value in target.items() if key not in rows}, device) for target in targets]
    return [{**{key: of_images[i] for key, of_images in parts.items()}, **others[i]} for i in range(len(targets))]


def target_on(target: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A target with its tensors on a device; what is none (torchvision's own `image_id` is a number) stays."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in target.items()}


def own_entries(matched: Tensor, chosen: Tensor, counts: Sequence[int]) -> Tensor:
    """Where the boxes that anchors are matched to stand, once those of all images are put in a row.

    Args:
        matched: [N, A] indices into the boxes of each anchor's own image.
        chosen: [F] indices into the flattened `matched`; all are matched to a box.
        counts: boxes of each image.
    """
    first = on_device([first for first, _ in _spans(counts)], matched.device)
    return matched.flatten()[chosen] + first[chosen // matched.shape[1]]


def match(matcher: Matcher, boxes: Sequence[Tensor], candidates: Sequence[Tensor]) -> Tensor:
    """The box that each candidate belongs to by overlap, as a torchvision `Matcher` has it.

    Args:
        boxes: [M_i, 4] xyxy of each image.
        candidates: [P_i, 4] of each image; the same tensor again and again where the images share them.

    Returns:
        [sum of P_i] int64: an index into the boxes of the candidate's own image, -1 for background, -2 between the
        thresholds. All of an image without boxes are background.
    """
    overlaps, indices, forced = [], [], []
    for overlap, of_image in zip(_overlaps(boxes, candidates), candidates, strict=True):
        if len(overlap):
            best, index = overlap.max(dim=0)
            if matcher.allow_low_quality_matches:
                forced.append((overlap == overlap.max(dim=1, keepdim=True).values).any(dim=0))
        else:
            best, index = of_image.new_full((len(of_image),), -1), torch.zeros_like(of_image[:, 0], dtype=torch.int64)
            forced.append(torch.zeros_like(index, dtype=torch.bool))
        overlaps.append(best)
        indices.append(index)
    best, index = torch.cat(overlaps), torch.cat(indices)
    low, high = matcher.low_threshold, matcher.high_threshold
    matched = index.masked_fill(best < low, Matcher.BELOW_LOW_THRESHOLD)
    if low < high:
        matched = matched.masked_fill((best >= low) & (best < high), Matcher.BETWEEN_THRESHOLDS)
    return torch.where(torch.cat(forced), index, matched) if matcher.allow_low_quality_matches else matched


def match_points(radius: float, boxes: Sequence[Tensor], points: Tensor, counts: Sequence[int]) -> Tensor:
    """The box that each point of FCOS belongs to, as `FCOS.compute_loss` has it.

    A point belongs to a box that it lies in, near its centre, and whose farthest side is at a distance that the point's
    level is for; to the smallest of several.

    Args:
        radius: how near, in sides of the squares that describe points.
        boxes: [M_i, 4] xyxy of each image.
        points: [A, 4] squares, level by level.
        counts: points of each level.

    Returns:
        [N, A] int64: an index into the boxes of an image, -1 for background.
    """
    centers, sides = (points[:, :2] + points[:, 2:]) / 2, points[:, 2] - points[:, 0]
    x, y = centers[..., None].unbind(1)
    nearest, farthest = sides * 4, sides * 8
    nearest[: counts[0]], farthest[-counts[-1] :] = 0, float("inf")
    found = []
    for images in _together([len(b) for b in boxes], [len(points)] * len(boxes), shared=True):
        every = torch.cat(list(boxes[images]))
        x1, y1, x2, y2 = every.unbind(1)
        middles = (every[:, :2] + every[:, 2:]) / 2
        fits = (centers[:, None] - middles).abs().amax(dim=2) < radius * sides[:, None]
        distances = torch.stack([x - x1, y - y1, x2 - x, y2 - y], dim=2)
        fits &= distances.amin(dim=2) > 0
        distances = distances.amax(dim=2)
        fits &= (distances > nearest[:, None]) & (distances < farthest[:, None])
        smallness = fits.to(torch.float32) * (1e8 - (x2 - x1) * (y2 - y1))
        for of_image in smallness.split([len(b) for b in boxes[images]], dim=1):
            if of_image.shape[1]:
                best, index = of_image.max(dim=1)
                found.append(index.masked_fill(best < 1e-5, -1))
            else:
                found.append(torch.full_like(sides, -1, dtype=torch.int64))
    return torch.stack(found)


def _overlaps(boxes: Sequence[Tensor], candidates: Sequence[Tensor]) -> Iterator[Tensor]:
    """[M_i, P_i] IoU of each image."""
    shared = all(of_image is candidates[0] for of_image in candidates)
    for images in _together([len(b) for b in boxes], [len(c) for c in candidates], shared):
        rows, columns = boxes[images], candidates[images]
        overlaps = box_iou(torch.cat(list(rows)), columns[0] if shared else torch.cat(list(columns)))
        for of_image, (first, end) in zip(
            overlaps.split([len(b) for b in rows]), _spans([len(c) for c in columns]), strict=True
        ):
            yield of_image if shared else of_image[:, first:end]


def _together(rows: Sequence[int], columns: Sequence[int], shared: bool) -> Iterator[slice]:
    """Images whose rows and columns make a table of at most `MAX_ELEMENTS`, or single ones."""
    start = 0
    for end in range(1, len(rows) + 1):
        more = slice(start, end + 1)
        width = columns[start] if shared else sum(columns[more])
        if end == len(rows) or sum(rows[more]) * width > MAX_ELEMENTS:
            yield slice(start, end)
            start = end


def _spans(counts: Sequence[int]) -> list[tuple[int, int]]:
    """(first, end) of each part of what is as many parts in a row."""
    ends = list(accumulate(counts))
    return list(zip([0, *ends], ends, strict=False))


def sample(
    sampler: BalancedPositiveNegativeSampler, labels: Tensor, counts: Sequence[int]
) -> tuple[Tensor, Tensor, list[int]]:
    """Random foreground and background elements of each image, as torchvision's sampler draws them.

    Args:
        labels: [sum of counts]: at least 1 for foreground, 0 for background, -1 for ignored.
        counts: elements of each image.

    Returns:
        Indices of the foreground and of the background elements that are drawn, in ascending order, and how many of
        both there are in each image.
    """
    groups = torch.stack([labels >= 1, labels == 0])
    ends = on_device(list(accumulate(counts)), labels.device)
    seen = F.pad(groups.cumsum(dim=1), (1, 0))[:, ends].tolist()
    (positives, _), (negatives, _) = spans = [_apart(of_group) for of_group in seen]
    wanted = int(sampler.batch_size_per_image * sampler.positive_fraction)
    taken_positives = [min(wanted, available) for available in positives]
    taken_negatives = [
        min(sampler.batch_size_per_image - taken, available)
        for taken, available in zip(taken_positives, negatives, strict=True)
    ]
    draws: tuple[list[Tensor], list[Tensor]] = ([], [])
    for image in zip(positives, taken_positives, negatives, taken_negatives, strict=True):
        for drawn, available, taken in zip(draws, image[::2], image[1::2], strict=True):
            drawn.append(torch.randperm(available, device=labels.device)[:taken])
    # `where` lists all foreground elements, then all background elements, image by image.
    firsts = [*spans[0][1], *(sum(positives) + first for first in spans[1][1])]
    offsets = torch.tensor(firsts).repeat_interleave(torch.tensor([*taken_positives, *taken_negatives]))
    chosen = torch.where(groups)[1][torch.cat([*draws[0], *draws[1]]) + offsets.to(labels.device, non_blocking=True)]
    positive, negative = chosen.split([sum(taken_positives), sum(taken_negatives)])
    taken = [sum(both) for both in zip(taken_positives, taken_negatives, strict=True)]
    return positive.sort().values, negative.sort().values, taken


def _apart(ends: list[int]) -> tuple[list[int], list[int]]:
    """Sizes of parts in a row, and where each begins, from where each ends."""
    firsts = [0, *ends[:-1]]
    return [end - first for first, end in zip(firsts, ends, strict=True)], firsts


def on_device(values: Sequence, device: torch.device) -> Tensor:
    """Numbers of the host as a tensor; small enough for the host not to wait for its copy."""
    return torch.tensor(values).to(device, non_blocking=True)


def filter_proposals(
    rpn: RegionProposalNetwork,
    objectness: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    counts: Sequence[int],
    sizes: Sequence[tuple[int, int]],
) -> list[Tensor]:
    """`RegionProposalNetwork.filter_proposals` on boxes that are decoded only where their scores are among the best.

    Args:
        objectness: [N * A, 1] logits; deltas: [N * A, 4]. No gradient goes through them.
        anchors: [A, 4], the same for all images.
        counts: anchors of each level.
        sizes: (height, width) of each image's own area, to which proposals are clipped.

    Returns:
        [P_i, 4] of each image, best first.
    """
    images = len(sizes)
    logits = objectness.detach().reshape(images, -1)
    best = rpn._get_top_n_idx(logits, list(counts))
    chosen = deltas.detach().view(images, -1, 4).gather(1, best[..., None].expand(-1, -1, 4))
    boxes = rpn.box_coder.decode_single(chosen.view(-1, 4), anchors[best.flatten()]).view(images, -1, 4)
    scores = logits.gather(1, best).sigmoid()
    limits = on_device([[width, height, width, height] for height, width in sizes], boxes.device).to(boxes.dtype)
    boxes = boxes.clamp(min=0).minimum(limits[:, None])
    kept = ((boxes[..., 2:] - boxes[..., :2]) >= rpn.min_size).all(dim=-1) & (scores >= rpn.score_thresh)
    by_level = [min(count, rpn.pre_nms_top_n()) for count in counts]
    levels = torch.arange(len(counts)).repeat_interleave(torch.tensor(by_level)).to(boxes.device, non_blocking=True)
    index = torch.where(kept.flatten())[0]
    left = kept.sum(dim=1).tolist()
    parts = (boxes.flatten(0, 1)[index], scores.flatten()[index], levels.repeat(images)[index])
    found = []
    for of_image, of_scores, of_levels in zip(*(part.split(left) for part in parts), strict=True):
        best = batched_nms(of_image, of_scores, of_levels, rpn.nms_thresh)[: rpn.post_nms_top_n()]
        found.append(of_image[best])
    return found


def proposal_losses(
    rpn: RegionProposalNetwork, objectness: Tensor, deltas: Tensor, anchors: Tensor, boxes: Sequence[Tensor]
) -> dict[str, Tensor]:
    """torchvision's losses of the region proposal network, on anchors drawn at random.

    Args:
        objectness, deltas, anchors: as in `filter_proposals`, with gradient.
        boxes: [M_i, 4] of each image.
    """
    a_image = len(anchors)
    matched = match(rpn.proposal_matcher, boxes, [anchors] * len(boxes)).view(len(boxes), a_image)
    labels = (matched >= 0).float().masked_fill(matched == Matcher.BETWEEN_THRESHOLDS, -1).flatten()
    positive, negative, _ = sample(rpn.fg_bg_sampler, labels, [a_image] * len(boxes))
    sampled = torch.cat([positive, negative])
    of_boxes = torch.cat(list(boxes))[own_entries(matched, positive, [len(b) for b in boxes])]
    wanted = rpn.box_coder.encode_single(of_boxes, anchors[positive % a_image])
    return {
        "loss_objectness": F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], labels[sampled]),
        "loss_rpn_box_reg": F.smooth_l1_loss(deltas[positive], wanted, beta=1 / 9, reduction="sum") / len(sampled),
    }


def sample_regions(
    heads: RoIHeads, proposals: Sequence[Tensor], boxes: Sequence[Tensor], classes: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Proposals and ground-truth boxes, matched and sampled: `RoIHeads.select_training_samples`.

    Args:
        proposals: [P_i, 4] of each image.
        boxes, classes: [M_i, 4] and [M_i] of each image.

    Returns:
        For each image [R_i, 4] boxes, [R_i] labels, 0 for background, and [R_i, 4] the boxes that they are matched to;
        what stands there beside the background means nothing.
    """
    device = proposals[0].device
    boxes = [of_image.to(proposals[0].dtype) for of_image in boxes]
    counts = [len(proposed) + len(given) for proposed, given in zip(proposals, boxes, strict=True)]
    candidates = torch.cat([part for pair in zip(proposals, boxes, strict=True) for part in pair])
    matched = match(heads.proposal_matcher, boxes, candidates.split(counts))
    first = on_device([first for first, _ in _spans([len(b) for b in boxes])], device)
    first = first.repeat_interleave(on_device(counts, device), output_size=len(candidates))
    index = matched.clamp(min=0) + first
    # One more entry, for the background of a last image without boxes.
    labels = F.pad(torch.cat(list(classes)), (0, 1))[index].masked_fill(matched == Matcher.BELOW_LOW_THRESHOLD, 0)
    labels = labels.masked_fill(matched == Matcher.BETWEEN_THRESHOLDS, -1)
    positive, negative, taken = sample(heads.fg_bg_sampler, labels, counts)
    sampled = torch.cat([positive, negative]).sort().values
    of_boxes = F.pad(torch.cat(boxes), (0, 0, 0, 1))[index[sampled]]
    return tuple(list(part.split(taken)) for part in (candidates[sampled], labels[sampled], of_boxes))


def proposes_plainly(rpn: nn.Module) -> bool:
    """Whether a region proposal network matches, samples and learns as torchvision's own does."""
    return _is_plain(rpn, RegionProposalNetwork, "forward", "assign_targets_to_anchors", "compute_loss")


def samples_plainly(heads: nn.Module) -> bool:
    """Whether the heads of a Faster R-CNN match and sample as torchvision's own do."""
    steps = ("add_gt_proposals", "assign_targets_to_proposals", "subsample")
    return _is_plain(heads, RoIHeads, "select_training_samples", *steps)


def learns_plainly(heads: nn.Module) -> bool:
    """Whether they also learn as torchvision's own do, of boxes alone."""
    return (
        samples_plainly(heads)
        and _is_plain(heads, RoIHeads, "forward")
        and not (heads.has_mask() or heads.has_keypoint())
    )


def _is_plain(module: nn.Module, kind: type[nn.Module], *methods: str) -> bool:
    """Whether a module has these methods of torchvision's, and its matcher and sampler."""
    return (
        all(getattr(getattr(module, name), "__func__", None) is getattr(kind, name) for name in methods)
        and type(module.proposal_matcher) is Matcher
        and type(module.fg_bg_sampler) is BalancedPositiveNegativeSampler
    )
