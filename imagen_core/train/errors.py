"""What can go wrong in training."""


class TrainError(Exception):
    """Root of the trainer's errors: a setting, store or machine that does not fit; the message says what to do."""


class CheckpointError(TrainError):
    """A checkpoint is missing, incomplete or damaged."""


class CheckpointMismatchError(TrainError):
    """A checkpoint was made with another model, or on other embeddings, than requested now."""


class NonFiniteLossError(TrainError):
    """The loss or a gradient is not finite; the weights are the ones before this step."""


class TrainingStopped(TrainError):
    """The training received a request to stop, and saved a checkpoint."""
