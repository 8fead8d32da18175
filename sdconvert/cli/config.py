"""`sdconvert config`: show, check and document recipes."""

from typing import Annotated

import typer

from sdconvert.cli.convert import RecipeArgument, SetOption
from sdconvert.cli.session import Session

app = typer.Typer(help="Show, check and document recipes.")


@app.command()
def show(ctx: typer.Context, recipe: RecipeArgument = "pasd_tiny", set_: SetOption = None) -> None:
    """Print a recipe with every default filled in, as YAML."""
    from sdconvert.config import dump_recipe, load_recipe

    loaded = load_recipe(recipe, set_)
    session: Session = ctx.obj
    session.show(loaded.model_dump(mode="json"), dump_recipe(loaded).rstrip())


@app.command()
def validate(
    ctx: typer.Context, recipe: Annotated[str, typer.Argument(help="A YAML file, or a name.")], set_: SetOption = None
) -> None:
    """Check a recipe; exit code 2 if it is refused."""
    from sdconvert.config import load_recipe

    loaded = load_recipe(recipe, set_)
    session: Session = ctx.obj
    session.show({"recipe": loaded.name, "valid": True}, f"`{recipe}` is a valid recipe")


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, with a description of every key."""
    import json

    from sdconvert.config import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))
