"""The errors users see. Knows nothing of the modules that raise them.

A message names what was wrong (key and value), what is allowed, and what to do next; a
traceback is never part of it. `exit_code` is what the command line returns. Violations of our
own invariants are `assert`s, not these.
"""

from collections.abc import Mapping, Sequence


class NodeweaveError(Exception):
    """Base of every error that is reported without a traceback."""

    exit_code = 1


class ConfigError(NodeweaveError):
    """The configuration is wrong: an unknown group, key or value, or contradictory settings."""

    exit_code = 2


class PlanError(ConfigError):
    """The parallelism plan does not fit the model or the machines; lists every problem found.

    `problems` holds one sentence each, naming the key to change.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(
            "the plan does not fit:\n" + "\n".join(f"  - {problem}" for problem in self.problems)
        )


class PluginError(ConfigError):
    """A plugin failed to load, is missing, is registered twice, or does not keep its contract."""


class ModelError(NodeweaveError):
    """The model's files are missing, corrupt, or do not match its configuration."""

    exit_code = 2


class ModelKeyError(ModelError):
    """A key of a model's configuration is missing, or says what is not supported.

    `rest` continues the sentence that `key` begins: "=3 is not supported; allowed: ...".
    """

    def __init__(self, key: str, rest: str) -> None:
        self.key, self.rest = key, rest
        super().__init__(f"config.json: {key}{rest}")

    def named(self, names: Mapping[str, str]) -> ModelError:
        """The same in the terms of files without a config.json: `names` says what they call each
        key, the place included."""
        return ModelError(f"{names[self.key]}{self.rest}") if self.key in names else self


class ResourceError(NodeweaveError):
    """The machine lacks something that was asked for: memory, a port, a device."""

    exit_code = 2


class WorkerDied(NodeweaveError):
    """A process of this engine ended when it should not have; names it and the cause.

    `ranks`: of a rank that finds its peers gone, which ones it misses.
    """

    def __init__(self, message: str, *, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class RequestError(NodeweaveError):
    """One request is invalid. The frontend answers it with `status`; no other request is touched.

    `param` is the offending field in the request body, `code` a short machine-readable word.
    """

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status
