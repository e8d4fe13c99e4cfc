"""defeat: turn a large object detector into a small one by decoupled feature distillation (DeFeat, CVPR 2021)."""

__version__ = "0.1.0"
