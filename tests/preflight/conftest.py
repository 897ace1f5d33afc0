"""The flagship recipe, as the rehearsal's tests read it."""

from tests.rehearse.conftest import flagship  # noqa: F401
