"""A plug-in one of whose dependencies is missing."""

import a_dependency_that_is_not_installed  # type: ignore[import-not-found]  # noqa: F401
