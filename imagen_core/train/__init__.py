"""Training of one stage from a store."""

from imagen_core.train.checkpoints.load import LoadedDenoiser, load_checkpoint
from imagen_core.train.components import EmaConfig, OptimizerConfig, ParameterGroup
from imagen_core.train.config import TrainConfig
from imagen_core.train.data.online import OnlineEncoder
from imagen_core.train.errors import (
    CheckpointError,
    CheckpointMismatchError,
    NonFiniteLossError,
    StoreLostError,
    TrainError,
    TrainingStopped,
)
from imagen_core.train.lora.config import LoraConfig, LoraUseConfig
from imagen_core.train.meter import TrainingProgress
from imagen_core.train.start import TrainingStart
from imagen_core.train.trainer import train

__all__ = [
    "CheckpointError",
    "CheckpointMismatchError",
    "EmaConfig",
    "LoadedDenoiser",
    "LoraConfig",
    "LoraUseConfig",
    "NonFiniteLossError",
    "OnlineEncoder",
    "OptimizerConfig",
    "ParameterGroup",
    "StoreLostError",
    "TrainConfig",
    "TrainError",
    "TrainingProgress",
    "TrainingStart",
    "TrainingStopped",
    "load_checkpoint",
    "train",
]
