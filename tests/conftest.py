"""Settings of the whole suite."""

from hypothesis import settings

# On a busy machine an example may take any time, and a failure must be found again by everybody.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")
