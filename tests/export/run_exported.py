"""Detects in an image with onnxruntime, Pillow and numpy alone: `python run_exported.py detector.onnx image.jpg`."""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

file, picture = sys.argv[1:3]
session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
card = json.loads(session.get_modelmeta().custom_metadata_map["defeat"])

image = np.array(ImageOps.exif_transpose(Image.open(picture)).convert("RGB"))
if card["input"] == "float":
    image = image.transpose(2, 0, 1).astype(np.float32) / 255

boxes, scores, labels = session.run(["boxes", "scores", "labels"], {"image": image})
for box, score, label in zip(boxes, scores, labels, strict=True):
    if score >= 0.5:
        print(f"{card['classes'][label - 1]} {score:.3f}", *(f"{side:.1f}" for side in box))
