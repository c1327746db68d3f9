"""What goes wrong by the user's hand, as opposed to by ours."""


class UserError(ValueError):
    """Bad input. The message is all the user sees: it names the file, key or shape and says what to do."""
