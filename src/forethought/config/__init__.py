"""Options, errors, and loading them from files and the command line. Importing it imports no torch."""

from forethought.config.loading import (
    BUDGET,
    as_json,
    changed_on_resume,
    changes,
    difference,
    explain,
    find,
    flatten,
    from_dict,
    load,
    merge,
    option_names,
    own_options,
    read_overrides,
    read_toml,
    shipped,
    to_dict,
)
from forethought.config.options import (
    Above0,
    Config,
    Corpus,
    Evaluate,
    Lora,
    Method,
    Model,
    Name,
    Optim,
    Parallel,
    Positive,
    Questions,
    Rollout,
    Train,
    Update,
)
from forethought.config.registry import Notice, RunError, UserError

__all__ = [
    "BUDGET", "Above0", "Config", "Corpus", "Evaluate", "Lora", "Method", "Model", "Name", "Notice", "Optim",
    "Parallel", "Positive", "Questions", "Rollout", "RunError", "Train", "Update", "UserError",
    "as_json", "changed_on_resume", "changes", "difference", "explain", "find", "flatten", "from_dict", "load",
    "merge", "option_names", "own_options", "read_overrides", "read_toml", "shipped", "to_dict",
]  # fmt: skip
