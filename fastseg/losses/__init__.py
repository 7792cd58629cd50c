"""Losses on small logits, for ``fastseg.nn.UpsampleLoss``; modules hold those of other libraries by their names."""

from fastseg.losses import monai, nnunet, smp, ultralytics
from fastseg.losses.hard_pixels import OHEM, TopK
from fastseg.losses.names import parse_loss
from fastseg.losses.regions import Dice, GeneralizedDice, Jaccard, Tversky
from fastseg.losses.terms import BinaryCrossEntropy, CrossEntropy, Focal, Term

__all__ = [
    "OHEM",
    "BinaryCrossEntropy",
    "CrossEntropy",
    "Dice",
    "Focal",
    "GeneralizedDice",
    "Jaccard",
    "Term",
    "TopK",
    "Tversky",
    "monai",
    "nnunet",
    "parse_loss",
    "smp",
    "ultralytics",
]
