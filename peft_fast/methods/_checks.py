"""What the methods check in the same way."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_targets(config: Any) -> None:
    """Raise ValueError where the fields that choose modules contradict each other; make lists sets, as peft does."""
    if config.layers_to_transform is not None and isinstance(config.target_modules, str):
        raise ValueError(
            f"layers_to_transform: write the layers into the regular expression target_modules, "
            f"got {config.layers_to_transform!r} and {config.target_modules!r}"
        )
    if isinstance(config.layers_to_transform, (list, tuple, set)) and not config.layers_to_transform:
        raise ValueError(f"layers_to_transform: names no layer, got {config.layers_to_transform!r}")
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError(f"layers_pattern: needs layers_to_transform, got layers_pattern={config.layers_pattern!r}")
    for name in ("target_modules", "exclude_modules"):
        if isinstance(getattr(config, name), list):
            setattr(config, name, set(getattr(config, name)))


def cannot_merge(kind: str) -> ValueError:
    return ValueError(
        f"{kind} cannot be merged: no weight of the base model can hold it. Keep it, or take it off with unload()"
    )


class NeverMerges:
    """A layer whose adapters no weight of the base model could hold."""

    kind: str
    # What `peft.helpers.disable_input_dtype_casting` switches; the ops take any dtypes that a cast would bring here.
    cast_input_dtype_enabled = True

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise cannot_merge(self.kind)

    def unmerge(self) -> None:
        """Nothing is ever merged."""


class RefusesMixedBatches:
    """A tuner whose adapters serve whole batches: peft drops `adapter_names` silently where a tuner takes none."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Iterator:
        if adapter_names is not None:
            raise ValueError(
                f"adapter_names: {type(self).__name__} has no batches of several adapters, got {adapter_names!r}; call "
                "set_adapter and run each adapter's part of the batch"
            )
        yield
