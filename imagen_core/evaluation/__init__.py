"""Metrics of generated images, from features of any model: no model is loaded here."""

from imagen_core.evaluation.clip_score import ClipScore, clip_score
from imagen_core.evaluation.frechet import FrechetDistance, frechet_distance
from imagen_core.evaluation.inception_score import InceptionScore, inception_score
from imagen_core.evaluation.kernel import KernelDistance, kernel_distance
from imagen_core.evaluation.moments import Moments
from imagen_core.evaluation.neighbours import PrecisionRecall, precision_recall

__all__ = [
    "ClipScore",
    "FrechetDistance",
    "InceptionScore",
    "KernelDistance",
    "Moments",
    "PrecisionRecall",
    "clip_score",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "precision_recall",
]
