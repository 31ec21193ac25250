"""What can go wrong in training."""


class TrainError(Exception):
    """Root of the trainer's errors: a setting, store or machine that does not fit; the message says what to do."""


class CheckpointError(TrainError):
    """A checkpoint is missing, incomplete or damaged."""


class CheckpointMismatchError(TrainError):
    """A checkpoint was made with another model, or on other embeddings, than requested now."""


class NonFiniteLossError(TrainError):
    """The loss or a gradient is not finite; the weights are the ones before this step."""


class StoreLostError(TrainError):
    """The store could not be read any more; a checkpoint was saved.

    Attributes:
        again: whether the same command can go on later, without anybody mending anything.
    """

    def __init__(self, message: str, *, again: bool = False) -> None:  # the default is for pickle
        super().__init__(message)
        self.again = again


class TrainingStopped(TrainError):
    """The training received a request to stop, and saved a checkpoint."""
