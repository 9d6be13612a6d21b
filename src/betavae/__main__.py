"""The console command `betavae NAME ...`, which runs `train.py` or `scripts/NAME.py`."""

import ast
import contextlib
import io
import os
import runpy
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent
# A wheel has train.py, scripts/ and configs/ in the package, a clone has them beside `src`.
ROOT = PACKAGE if (PACKAGE / "train.py").is_file() else PACKAGE.parents[1]


def list_commands() -> dict[str, Path]:
    """List the scripts by the names of their commands, train first."""
    return {path.stem: path for path in (ROOT / "train.py", *sorted(ROOT.glob("scripts/*.py")))}


def describe(script: Path) -> str:
    """Return the first clause of a script's docstring."""
    return (ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or "").partition(": `")[0]


def main() -> None:
    commands, name = list_commands(), next(iter(sys.argv[1:]), "--help")
    if name in ("--help", "-h"):
        print("Usage: betavae COMMAND [key=value ...]; `betavae COMMAND --help` lists the settings of a command\n")
        print("\n".join(f"  {command:16}{describe(script)}" for command, script in commands.items()))
        return
    if name not in commands:
        from betavae.runtime.settings import suggest

        hint = suggest(name, commands, "; `betavae` lists the commands")
        sys.exit(f"error: {name} is not a command of betavae{hint}")
    os.environ["BETAVAE_CONSOLE"] = "1"  # for the messages of this process and of those that it starts
    del sys.argv[1]
    script = str(commands[name])
    if not {"--help", "-h"} & set(sys.argv):
        runpy.run_path(script, run_name="__main__")
        return
    from betavae.runtime.cli import adapt_commands

    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):  # Hydra prints the help of train itself
            runpy.run_path(script, run_name="__main__")
    finally:  # and exits
        print(adapt_commands(text.getvalue()), end="")


if __name__ == "__main__":
    main()
