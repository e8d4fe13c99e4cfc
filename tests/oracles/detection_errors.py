"""TIDE error types and their cost the slow way: one detection at a time, straight from the definitions."""

from __future__ import annotations

import numpy as np


def iou(a, b, crowd=False):
    """IoU of two xywh boxes; intersection over `a` where `b` is a crowd."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / (a[2] * a[3] if crowd else a[2] * a[3] + b[2] * b[3] - shared)


def sort_out(detections, ground_truth):
    """Copies of the detections, best first, each with `type` ("right", "ignored" or an error) and `points_at`; and
    copies of the objects, each with `taken`."""
    objects = [dict(o, taken=False) for o in ground_truth["annotations"] if not o["iscrowd"]]
    crowds = [o for o in ground_truth["annotations"] if o["iscrowd"]]
    found = sorted((dict(d) for d in detections), key=lambda d: -d["score"])
    for d in found:
        here = [o for o in objects if o["image_id"] == d["image_id"]]
        own = [(iou(d["bbox"], o["bbox"]), o) for o in here if o["category_id"] == d["category_id"]]
        other = [(iou(d["bbox"], o["bbox"]), o) for o in here if o["category_id"] != d["category_id"]]
        own_iou, own_object = max(own, key=lambda pair: pair[0], default=(0, None))
        other_iou, other_object = max(other, key=lambda pair: pair[0], default=(0, None))
        free = [(value, o) for value, o in own if value >= 0.5 and not o["taken"]]
        own_crowds = [o for o in crowds if (o["image_id"], o["category_id"]) == (d["image_id"], d["category_id"])]
        on_crowd = any(iou(d["bbox"], o["bbox"], crowd=True) >= 0.5 for o in own_crowds)
        if free:
            max(free, key=lambda pair: pair[0])[1]["taken"] = True
            d["type"] = "right"
        elif on_crowd:
            d["type"] = "ignored"
        elif 0.1 <= own_iou < 0.5:
            d["type"], d["points_at"] = "localisation", own_object
        elif other_iou >= 0.5:
            d["type"], d["points_at"] = "classification", other_object
        elif own_iou >= 0.5:
            d["type"] = "duplicate"
        elif own_iou < 0.1 and other_iou < 0.1:
            d["type"] = "background"
        else:
            d["type"] = "both"
    return found, objects


def mean_ap(scored, wanted):
    """Precision at 101 recalls, mean over classes; scored: (score, class, right), wanted: objects of each class."""
    averages = []
    for k, number in wanted.items():
        if number == 0:
            continue
        curve, hits = [], 0
        for place, (_, _, right) in enumerate(sorted((s for s in scored if s[1] == k), key=lambda s: -s[0]), start=1):
            hits += right
            curve.append((hits, hits / place))
        total = 0
        for recall in np.linspace(0, 1, 101):
            total += max((precision for hits, precision in curve if hits / number >= recall), default=0)
        averages.append(total / 101)
    return sum(averages) / len(averages) if averages else 1.0


def costs(detections, ground_truth):
    """AP50, counts by type, and dAP by type and of all false positives and negatives."""
    found, objects = sort_out(detections, ground_truth)
    classes = [c["id"] for c in ground_truth["categories"]]
    wanted = {k: sum(o["category_id"] == k for o in objects) for k in classes}
    plain = [(d["score"], d["category_id"], d["type"] == "right") for d in found if d["type"] != "ignored"]
    ap50 = mean_ap(plain, wanted)

    pointed_at = [d["points_at"] for d in found if "points_at" in d]
    missed = [o for o in objects if not o["taken"] and not any(o is p for p in pointed_at)]
    still_wanted = {k: wanted[k] - sum(o["category_id"] == k for o in missed) for k in classes}
    were_found = {k: sum(o["category_id"] == k and o["taken"] for o in objects) for k in classes}

    names = ("classification", "localisation", "both", "duplicate", "background")
    counts = {name: sum(d["type"] == name for d in found) for name in names} | {"missed": len(missed)}
    dap = {
        "missed": mean_ap(plain, still_wanted) - ap50,
        "false_positives": mean_ap([s for s in plain if s[2]], wanted) - ap50,
        "false_negatives": mean_ap(plain, were_found) - ap50,
    }
    for name in names:
        mended, used = [], []
        for d in found:
            if d["type"] == name:
                target = d.get("points_at")
                if target is not None and not target["taken"] and not any(target is u for u in used):
                    used.append(target)
                    mended.append((d["score"], target["category_id"], True))
            elif d["type"] != "ignored":
                mended.append((d["score"], d["category_id"], d["type"] == "right"))
        dap[name] = mean_ap(mended, wanted) - ap50
    return ap50, counts, dap
