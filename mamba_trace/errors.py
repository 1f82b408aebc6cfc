"""The exceptions of this package."""


class MambaTraceError(Exception):
    """Base class of every exception this package raises on purpose."""


class CheckpointError(MambaTraceError, ValueError):
    """A checkpoint, configuration or state dict cannot be found, recognised or converted."""


class UnknownSiteError(MambaTraceError, AttributeError, KeyError):
    """A name that is no site, hook name or path."""

    __str__ = Exception.__str__  # KeyError would show the message quoted


class LayerError(UnknownSiteError, IndexError):
    """A layer that the model does not have or that a run does not compute: no site of it exists there."""


class PositionError(MambaTraceError, IndexError):
    """A position outside the forward call it was asked of."""


class SiteOrderError(MambaTraceError):
    """A site was asked for after the run had gone past it; an `OutOfOrderError` of nnsight's too.

    nnsight takes seconds to import, and a command line that prints its help needs none of it. So `tracing`, which
    raises this error, adds nnsight's class to its bases.
    """


class SiteValueError(MambaTraceError, ValueError):
    """A value that cannot stand at a site: wrong type, shape or dtype."""


class BackendError(MambaTraceError, RuntimeError):
    """A scan backend that does not exist or cannot run here."""


class ArgumentError(MambaTraceError, ValueError):
    """A number or an option of a call that is of the wrong type or out of range."""


class PromptError(MambaTraceError, ValueError):
    """Prompts, answers or tokens that do not fit the question asked of them."""


class InitializationError(MambaTraceError, ValueError):
    """A model or a setting that cannot be initialised from scratch."""


class MetricError(MambaTraceError, ValueError):
    """A metric that does not give one number per prompt, or the same number where two are compared."""


class FileError(MambaTraceError, ValueError):
    """A file that cannot be written or read as asked."""


class MissingExtraError(MambaTraceError, ImportError):
    """An optional dependency that is not installed."""


class ProcessesError(MambaTraceError, RuntimeError):
    """Several processes that should compute one thing together, and do not."""


class VersionError(MambaTraceError, RuntimeError):
    """A request was written for another release of this package than the server has."""


class TraceError(MambaTraceError, RuntimeError):
    """A run that cannot start where it was asked for, since its model is in another one."""
