"""The settings that may change when a run resumes."""

from __future__ import annotations

from typing import Any

from d2v_ds.config.decoding import differences, value_at
from d2v_ds.errors import UserError

MAY_CHANGE = (
    *("run.steps", "run.threads", "run.dir", "engine", "data.workers", "log", "save"),
    *("data.max_bad", "data.valid", "valid", "probe", "finetune.patience"),
    "model.checkpoint_activations",
)


def refuse_changes(
    old: dict[str, Any], new: dict[str, Any], allowed: tuple[str, ...] = ()
) -> list[str]:
    """Compares the configuration of a checkpoint with that of this run. Returns the settings that
    differ and are named in `allowed`, by path or by section.

    Raises UserError if other settings outside MAY_CHANGE differ.
    """
    changed = [
        key
        for key in differences(old, new)
        if not any(key == free or key.startswith(free + ".") for free in MAY_CHANGE)
    ]
    named = [k for k in changed if any(k == a or k.startswith(a + ".") for a in allowed)]
    refused = [k for k in changed if k not in named]
    if refused:
        shown = "; ".join(
            f"{key} was {value_at(old, key)!r}, is {value_at(new, key)!r}" for key in refused[:5]
        ) + ("; ..." if len(refused) > 5 else "")
        raise UserError(
            f"cannot resume with a changed configuration: {shown}. Restore the old value, choose "
            f"another run.dir, or pass --allow {refused[0]}"
        )
    return named
