"""The one exception whose message is meant for the person at the terminal."""


class UserError(Exception):
    """Something the user can put right. The message is one sentence: the key or file, what is wrong, what is right."""
