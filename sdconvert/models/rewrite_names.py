"""Names of the rewrites beside attention per head, and which of them needs which; nothing here needs torch."""

import difflib
from collections.abc import Iterable
from typing import Literal, get_args

from sdconvert.errors import UsageError

RewriteName = Literal["linear_to_conv2d", "gated_conv2d", "channel_layer_norm", "image_transformer", "image_context"]
REWRITES: tuple[RewriteName, ...] = get_args(RewriteName)
"""All of them, in the order in which they are applied."""
_NEEDS: dict[str, tuple[str, ...]] = {"image_transformer": ("linear_to_conv2d", "gated_conv2d", "channel_layer_norm")}


def require_rewrites(names: Iterable[str]) -> list[str]:
    """The asked rewrites in the order in which they are applied.

    Raises:
        UsageError: There is none of a name, or one needs another that is not asked for.
    """
    asked = dict.fromkeys(names)
    for name in asked:
        if name not in REWRITES:
            nearest = difflib.get_close_matches(name, REWRITES, n=1, cutoff=0)
            raise UsageError(f"no rewrite is called `{name}`", hint=f"nearest: `{nearest[0]}`")
        if missing := [needed for needed in _NEEDS.get(name, ()) if needed not in asked]:
            raise UsageError(f"rewrite `{name}` needs {', '.join(missing)}", hint="ask for these too, or leave it out")
    return [name for name in REWRITES if name in asked]
