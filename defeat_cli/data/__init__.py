"""Datasets: COCO and VOC folders, the drawn data set, and how samples become batches."""
