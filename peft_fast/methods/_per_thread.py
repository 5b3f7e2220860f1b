"""State that belongs to the forward that is running, where a model may run in several threads."""

import threading
from typing import Any


class PerThread(threading.local):
    """Attributes that each thread has for itself; those that it has not set are None. A copy starts empty."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None

    def __reduce__(self) -> tuple:
        return PerThread, ()
