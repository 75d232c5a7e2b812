"""The one exception of a user's mistake: its text is the whole message the user sees."""


class UserError(Exception):
    """Invalid input (config, data, checkpoint, topology), found before any training.

    The message says what was given, what was expected and how to mend it; the front door prints
    it once, from rank 0, without a traceback, and exits non-zero.

    kind: what `dtron.ranks.control` tells whoever may start the run again; a mistake would be the same again.
    """

    kind = "mistake"
