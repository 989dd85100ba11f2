"""The one exception that the command line turns into a single line and exit code 2."""


class UserError(ValueError):
    """Something the user can fix: the message names the file or option, the offending value and the fix."""
