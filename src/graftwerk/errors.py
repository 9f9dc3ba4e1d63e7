"""The one exception for input that a person can mend."""


class UserError(Exception):
    """Bad configuration, data or file: one line that names it, what is allowed and what to do.

    `python3 -m graftwerk` prints the message without a traceback and exits with code 2.
    """
