"""State that belongs to the forward that is running, where a model may run in several threads."""

import threading


class PerThread(threading.local):
    """Attributes that each thread has for itself, with the values of the class until it sets them; copies start so."""

    def __reduce__(self) -> tuple:
        return type(self), ()
