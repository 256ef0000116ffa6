"""One helper for messages about a name that nobody knows."""


def one_of(name, known, what):
    """Return `name` if it is in `known`, else raise ValueError that lists those known."""
    if name not in known:
        raise ValueError(f"Unknown {what} {name!r}. Known: {', '.join(map(str, known))}.")
    return name
