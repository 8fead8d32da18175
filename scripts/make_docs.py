"""Write the pages that the program itself knows best: every command's help, and the JSON schema of recipes.

Run by `make docs`; a test compares the pages with the program.
"""

import json
from pathlib import Path
from typing import Any

from typer.main import get_command

from sdconvert.cli.app import app
from sdconvert.config import Recipe

DOCS = Path(__file__).parents[1] / "docs"
_WIDTH = 100


def pages() -> dict[str, str]:
    """Return the generated pages by file name."""
    return {
        "commands.md": "\n".join(["# Commands", *_help(get_command(app), "sdconvert", None)]) + "\n",
        "recipe.schema.json": json.dumps(Recipe.model_json_schema(), indent=2) + "\n",
    }


def _help(command: Any, name: str, parent: Any) -> list[str]:
    # Typer calls contexts and commands by private names.
    with command.make_context(name, ["--help"], parent=parent, resilient_parsing=True, max_content_width=_WIDTH) as ctx:
        ctx.terminal_width = _WIDTH
        lines = ["", f"## {ctx.command_path}", "", "```text", command.get_help(ctx).rstrip(), "```"]
        for child, subcommand in getattr(command, "commands", {}).items():
            lines += _help(subcommand, child, ctx)
        return lines


def main() -> None:
    """Write the pages below docs/."""
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
