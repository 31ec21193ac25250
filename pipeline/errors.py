"""Errors that a user can meet. Each names the problem, the value and the remedy, and has an exit code."""

from collections.abc import Mapping

from imagen_core.far import StorageError

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INCOMPLETE = 3
EXIT_ENVIRONMENT = 4
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130


class PipelineError(Exception):
    """Root of all errors shown to the user without a traceback."""

    exit_code = EXIT_FAILED


class ConfigError(PipelineError):
    """A wrong command line, configuration value or input file."""

    exit_code = EXIT_USAGE


class StaleOutputError(PipelineError):
    """Finished work on disk was made with another configuration or other inputs."""

    exit_code = EXIT_USAGE


class MachineError(PipelineError):
    """The machine lacks something: a package, a GPU, disk space, model files."""

    exit_code = EXIT_ENVIRONMENT


class UnavailableError(MachineError):
    """Storage could not be reached for as long as it is waited for; the same command can go on later."""

    exit_code = EXIT_PREEMPTED


class LostFileError(MachineError):
    """A file that was committed is no longer there."""


class LockedError(MachineError):
    """Another run works in the run folder, or has taken it over."""


class RunError(PipelineError):
    """The run ended, but not as requested; `summary` says what it made."""

    def __init__(self, message: str, summary: Mapping[str, object]):
        super().__init__(message)
        self.summary = summary


class ShardError(RunError):
    """Some shards failed after all tries; the other shards are finished."""

    exit_code = EXIT_INCOMPLETE


class DropLimitError(RunError):
    """The run finished, but dropped more samples than `max_drop_fraction` allows."""

    exit_code = EXIT_INCOMPLETE


class PartsMissingError(PipelineError):
    """Of the parts of a run some are not done; the others are."""

    exit_code = EXIT_INCOMPLETE


class PreemptedError(PipelineError):
    """The run was stopped (SIGTERM, SIGHUP); the same command resumes it."""

    exit_code = EXIT_PREEMPTED


def storage_error(error: StorageError) -> MachineError:
    """What ends a command because of storage: by itself it passes, or somebody has to mend something."""
    return (UnavailableError if error.passes else MachineError)(str(error))


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
