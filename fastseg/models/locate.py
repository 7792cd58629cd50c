"""Find the tensors of a model in a file, and strip what training code wraps around a ``state_dict``."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from fastseg.models.keys import COUNTER, Form

DEPTH = 4  # levels of nested dictionaries that are searched
INSERTED = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # inserted by torch, anywhere in a name
# Names that training code gives to the attribute that holds the net; entries beside them do not belong to it.
WRAPPERS = {"module", "model", "net", "network", "ema", "ema_model", "model_ema", "student", "segmentor"}
ENCODERS = {"backbone", "encoder", "base"}
HARMLESS = {"mask_values", "n_averaged"}  # of milesial's train.py; of torch.optim.swa_utils.AveragedModel
SHOWN = 3  # keys of each kind that a message lists


class Found(NamedTuple):
    """Tensors under the model's names, and what to report about the others."""

    tensors: dict[str, object]
    form: Form
    place: str  # wrappers and prefix, joined by dots; empty for the file's top level
    missing: list[str]  # in the file's names
    unexpected: list[str]
    notes: list[str]


def locate(
    payload: object, forms: Sequence[Form], path: Path, *, key: str | None = None, encoder: bool = False
) -> Found:
    """Find the one dictionary of named tensors in ``payload`` that has all names of one of ``forms``.

    Nested dictionaries are searched. Segments that stand before every name are stripped, and so are those that
    ``torch.compile``, FSDP and activation checkpointing insert. If no dictionary has all names, the one with most is
    returned, with what is missing.

    Args:
        payload: content of the file.
        forms: candidates; the first whose names are all in a dictionary is taken.
        path: of the file, for error messages.
        key: a name on the way to the tensors, needed if several places in the file fit.
        encoder: True to look for an encoder; the file may hold the rest of its model too.

    Raises:
        ValueError: there is no dictionary of named tensors, or several fit.
    """
    dictionaries = [(place, _plain(tensors)) for place, tensors in _dictionaries(payload)]
    if not dictionaries:
        raise ValueError(f"load_weights: {path} holds a {type(payload).__name__}, not a dictionary of named tensors")
    fits, closest = [], (-1, None)
    for place, tensors in dictionaries:
        fitting = False
        for form in forms:
            wanted = {name for name in form.names.values() if not name.endswith(COUNTER)}
            for prefix, count in _prefixes(tensors, wanted):
                if count > closest[0]:
                    closest = (count, (place, tensors, form, prefix))
                if count == len(wanted):
                    fitting = True
                    fits.append((place, tensors, form, prefix))
            if fitting:
                break
    if not fits:
        return _found(*closest[1], encoder)
    places = [_name(place, prefix) for place, _, _, prefix in fits]
    if key is not None:
        chosen = [fit for fit, name in zip(fits, places, strict=True) if name == key]
        chosen = chosen or [fit for fit, name in zip(fits, places, strict=True) if key in name.split(".")]
    else:
        chosen = fits
    if len(chosen) == 1:
        return _found(*chosen[0], encoder)
    quoted = ", ".join(repr(name) if name else "its outermost names" for name in places)
    if key is not None:
        which = "none" if not chosen else "several"
        raise ValueError(f"load_weights: {path}: {which} of what fits is under {key!r}; what fits: {quoted}")
    raise ValueError(
        f"load_weights: {path} holds {len(fits)} sets of weights that fit: {quoted}; choose one by its name (key=..., "
        "--weights-key)"
    )


def _dictionaries(payload: object) -> Iterator[tuple[tuple[str, ...], Mapping]]:
    """(keys on the way, dictionary) of each dictionary that holds named tensors."""
    seen: set[int] = set()
    level: list[tuple[tuple[str, ...], object]] = [((), payload)]
    for _ in range(DEPTH):
        following = []
        for place, value in level:
            if not isinstance(value, Mapping) or id(value) in seen:
                continue
            seen.add(id(value))
            if all(isinstance(key, str) for key in value) and any(isinstance(v, Tensor) for v in value.values()):
                yield place, value
            following += [((*place, str(key)), inner) for key, inner in value.items() if isinstance(inner, Mapping)]
        level = following


def _plain(tensors: Mapping) -> dict[str, object]:
    """The names without nesting, and without the segments that torch inserts."""
    plain = {}
    for key, value in tensors.items():
        if isinstance(value, Mapping):
            continue
        short = ".".join(part for part in key.split(".") if part not in INSERTED)
        plain[key if short in plain or not short else short] = value
    return plain


def _prefixes(tensors: Mapping[str, object], wanted: set[str]) -> list[tuple[str, int]]:
    """(prefix, how many of ``wanted`` stand behind it): all prefixes with all of them, else the best one."""
    votes: Counter[str] = Counter({"": 0})
    depth = max((name.count(".") for name in wanted), default=0)
    for key in tensors:
        name = ""
        for segment in reversed(key.rsplit(".", depth + 1)[-(depth + 1) :]):
            name = f"{segment}.{name}" if name else segment
            if name in wanted:
                votes[key[: len(key) - len(name)]] += 1
    whole = [(prefix, count) for prefix, count in votes.items() if count == len(wanted)]
    return whole or [max(votes.items(), key=lambda pair: (pair[1], -len(pair[0])))]


def _found(place: tuple[str, ...], tensors: Mapping[str, object], form: Form, prefix: str, encoder: bool) -> Found:
    names = {f"{prefix}{name}": target for target, name in form.names.items()}
    wrappers = WRAPPERS | ENCODERS if encoder else WRAPPERS
    wrapped = prefix and set(prefix.rstrip(".").split(".")) <= wrappers
    unexpected, beside, notes = [], [], []
    noted = dict.fromkeys(form.noted, False)
    for key in tensors:
        if key in names:
            continue
        inner = key.removeprefix(prefix)
        if key in HARMLESS or inner in HARMLESS:
            continue
        if not key.startswith(prefix):
            (beside if wrapped else unexpected).append(key)
        elif about := next((begin for begin in noted if inner.startswith(begin)), None):
            noted[about] = True
        elif not inner.startswith(form.unused):
            unexpected.append(key)
    if beside:
        notes.append(f"{first(beside)} beside {prefix!r} left out")
    notes += [form.noted[begin] for begin, there in noted.items() if there]
    missing = [name for name in names if name not in tensors and not name.endswith(COUNTER)]
    given = {target: tensors[name] for name, target in names.items() if name in tensors}
    return Found(given, form, _name(place, prefix), missing, unexpected, notes)


def _name(place: tuple[str, ...], prefix: str) -> str:
    return ".".join([*place, *filter(None, prefix.split("."))])


def first(keys: Sequence[str]) -> str:
    """The first few, for a message."""
    return ", ".join(keys[:SHOWN]) + (", ..." if len(keys) > SHOWN else "")
