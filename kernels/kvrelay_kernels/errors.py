"""The error tree of the kernel library. Every error says what was needed and what there was."""


class KernelError(Exception):
    """Base of everything this library raises on purpose."""


class InvalidArgument(KernelError, ValueError):
    """An argument has the wrong shape, dtype, device or value."""

    def __init__(self, argument: str, *, needed: str, got: object) -> None:
        super().__init__(f"{argument}: needed {needed}, got {got}")
        self.argument = argument


class UnknownName(KernelError, KeyError):
    """A name is not in its table (implementations, selectors, cost models)."""

    def __str__(self) -> str:
        return str(self.args[0])


class KernelUnavailable(KernelError, RuntimeError):
    """An implementation asked for by name cannot run here; the message says why."""
