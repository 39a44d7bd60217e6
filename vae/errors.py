"""The one error for what a user gave: everything else that is raised is a defect of ours."""


class InputError(ValueError):
    """Something given cannot be used. The message is one sentence: file or key, what is wrong, the remedy."""


def require(condition: bool, given: str, expected: str) -> None:
    """Refuse `given` ("key=value") unless `condition` holds."""
    if not condition:
        raise InputError(f"{given}, expected {expected}")
