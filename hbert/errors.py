"""The errors that the hbert commands print as one line."""


class HbertError(Exception):
    """A problem that the user can solve; the message says what was wrong and what is allowed."""


class RequirementError(HbertError, ImportError):
    """A package that is needed is not installed, or too old; the message names the version."""


class FetchError(HbertError):
    """A package could not be downloaded or is not the one that was pinned."""
