"""The one exception that the command line turns into a single line and exit code 2, and what its messages have in common."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can fix: the message names the file or option, the offending value and the fix."""


def explained(error: Exception, model: str) -> UserError | None:
    """What a user of `--model MODEL` can do about an error of torch's, known by its words; None for another one."""
    text = str(error)
    if "more than 1 value per channel" in text:  # BatchNorm's
        return UserError(
            f"--model {model}: BatchNorm needs more than one picture at a time where one pixel is left of it; "
            "use a larger --batch (or --ascent-fraction), or larger pictures"
        )
    if "does not have a deterministic implementation" in text:  # begins with the operator's name
        return UserError(
            f"--deterministic: {text.split()[0]}, which --model {model} needs, is not deterministic on this device; "
            "leave --deterministic out or use another --model"
        )
    return None


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of `known` that is most like `name`, to ask whether it is meant; None where none is much like it."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)
