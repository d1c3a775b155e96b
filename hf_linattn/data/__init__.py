"""Texts, tagged words and images out of files, for the shell and the recipes. Needs `datasets`."""

from ..errors import ConfigError

try:
    import datasets  # noqa: F401
    import pyarrow  # noqa: F401
except ImportError as error:
    raise ConfigError(
        "Reading inputs needs datasets, which is not installed: pip install 'hf-linattn[cli]'"
    ) from error
