"""Parts of commands to be printed, so that they can be pasted into a shell."""

import re
import shlex
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException


def argument(key: str, value: str | Path) -> str:
    """Format `key=value` for a shell, quoted where Hydra would not read the value as that text."""
    text = str(value)
    text = f"./{text}" if text.startswith("~") else text  # or it would be a home folder
    try:
        plain = OverridesParser.create().parse_override(f"{key}={text}").value() == text and "${" not in text
    except HydraException:
        plain = False
    if not plain:
        escaped = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
        text = QuotedString(escaped, Quote.double).with_quotes()
    return shlex.quote(f"{key}={text}")
