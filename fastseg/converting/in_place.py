"""Convert a model in place, revert it, and say what was done."""

import fnmatch
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from torch import nn

from fastseg.converting.check import Checked, check
from fastseg.converting.classes import RULES, Converted, original_class, owner_of, put, put_back
from fastseg.converting.report import Conversion, Row
from fastseg.converting.rule import Rule, unknown_source

M = TypeVar("M", bound=nn.Module)
Filter = str | type | Iterable[str | type] | None
KEPT = "_fastseg_conversion"  # the attribute of the model that holds its report
NOTHING = "nothing to fuse"
QUANTISED = ("torch.ao.", "torch.nn.quantized", "torch.nn.intrinsic", "torch.nn.qat", "torchao.")


def convert(model: M, example: Any = None, *, only: Filter = None, skip: Filter = None) -> M:
    """Let fastseg compute the blocks of a model that it knows, in place; the same results to rounding.

    Parameters, buffers, their names, ``state_dict``, hooks, dtypes and ``isinstance`` stay, so optimizers, checkpoints
    and code that walks over the model go on. A converted block checks at each call that it is still built as its rule
    expects, and is computed as written if not, inside ``fastseg.reference()``, and while ``torch.fx`` traces it. The
    model trains, pickles, deep-copies, compiles and exports. To save the model itself, not its ``state_dict``, for code
    without fastseg, call ``revert`` first.

    A rule knows a class by its name, by what its instances hold, and by the text of its ``forward``; a version with
    another text is converted only where an example proves it.

    Args:
        model: any model.
        example: what the model is called with: a tensor, a tuple of arguments, or a dict of named ones; of real size,
            since what does not pay there is put back. Each converted block runs on its inputs, old against new, forward
            and gradient, in evaluation and in training (on copies in float64, to 1e-9 of the largest value), and is put
            back and named if they differ. None converts without that proof.
        only: names of modules (``fnmatch`` patterns) or classes; what is neither one of them nor inside one is left.
        skip: the same, of modules that are left.

    Returns:
        ``model``. ``fastseg.conversion(model)`` is the report.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: ``only`` or ``skip`` names a module that is not there.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> print(fastseg.conversion(fastseg.convert(model, torch.randn(1, 3, 32, 32))))  # doctest: +SKIP
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: {type(model).__name__} is not a torch.nn.Module; give a model")
    places = _Places(model, only, skip)
    rows: dict[int, Row] = {}
    why = _refused_whole(model)
    if why:
        rows[id(model)] = Row("", type(model).__name__, "", False, why)
    rejected: set[int] = set()
    while not why:
        placed = list(places.place(rejected, rows, proven=example is not None))
        if example is None or not placed:
            break
        try:
            checked = check(model, example, placed)
        except Exception as error:
            why = f"the model fails on the example: {type(error).__name__}: {error}"
            for module in model.modules():
                if id(module) in rows and rows[id(module)].converted:
                    put_back(module)
                    rows[id(module)].converted, rows[id(module)].why = False, why
            break
        for module in placed:
            _note(module, rows[id(module)], checked.get(id(module)), rejected)
    order = {id(module): i for i, module in enumerate(model.modules())}
    vars(model)[KEPT] = Conversion([rows[key] for key in sorted(rows, key=lambda key: order[key])])
    return model


def revert(model: M) -> M:
    """Undo ``convert`` in place: every block is computed as its own class is written.

    Raises:
        RuntimeError: a block was given another class since, as ``fully_shard`` does.
    """
    for module in model.modules():
        put_back(module)
    vars(model).pop(KEPT, None)
    return model


def conversion(model: nn.Module) -> Conversion:
    """What ``convert`` did to ``model``: a row for each module that a rule knows; ``print`` it.

    Of a part of a converted model, and after modules were exchanged, the rows are those that are there.
    """
    kept = vars(model).get(KEPT)
    if kept is not None:
        return kept
    converted = [(name, m) for name, m in model.named_modules() if isinstance(m, Converted)]
    return Conversion([Row(n, type(m).__name__, m.fastseg_rule.name, True, m.fastseg_rule.what) for n, m in converted])


def _note(module: nn.Module, row: Row, checked: Checked | None, rejected: set[int]) -> None:
    """Put the outcome of the example into the row; put the module back if it failed."""
    if checked is None:
        if why := unknown_source(module.fastseg_rule, module):
            row.converted, row.why = False, f"{why} that calls it"
            put_back(module)
            rejected.add(id(module))
        else:
            row.why += "; not called on the example"
        return
    row.products, row.bytes, row.error = checked.products, checked.bytes, checked.error
    if checked.why:
        row.converted, row.why = False, checked.why
        put_back(module)
        rejected.add(id(module))


def _refused_whole(model: nn.Module) -> str:
    """Why nothing of the model can be converted, or ""."""
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.is_meta:
            return f"{name} is on the meta device; convert the model once it has values"
    return ""


class _Places:
    """The modules of a model that rules know, under the caller's filters."""

    def __init__(self, model: nn.Module, only: Filter, skip: Filter):
        self.model = model
        self.names: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.names.setdefault(id(module), []).append(name)
        self.only, self.skip = (self._chosen(given, label) for given, label in ((only, "only"), (skip, "skip")))

    def _chosen(self, given: Filter, label: str) -> set[int] | None:
        """The modules that a filter names, with all inside them; None: there is no filter."""
        if given is None:
            return None
        chosen: set[int] = set()
        for one in (given,) if isinstance(given, (str, type)) else tuple(given):
            found = [m for n, m in self.model.named_modules(remove_duplicate=False) if _is_named(n, m, one)]
            if not found:
                raise ValueError(f"convert: {label} names {one!r}; no module of the model has this name or class")
            chosen.update(id(inner) for m in found for inner in m.modules())
        return chosen

    def place(self, rejected: set[int], rows: dict[int, Row], proven: bool) -> Iterator[nn.Module]:
        """Convert the outermost modules that a rule takes, and inside them what the rule only calls."""
        taken: set[int] = set()
        for module in self.model.modules():
            if id(module) in taken:
                continue
            if isinstance(module, Converted):
                taken.update(_inside(module.fastseg_rule, module))
                if id(module) not in rows:
                    rows[id(module)] = self._row(module, module.fastseg_rule, True, "was converted before")
                continue
            rule = None if id(module) in rejected else rule_of(module)
            outside = self.only is not None and id(module) not in self.only
            if rule is None or outside or (self.skip is not None and id(module) in self.skip):
                if rule is None and id(module) not in rejected and (why := _foreign(module)):
                    rows[id(module)] = self._row(module, None, False, why)
                continue
            why = self._refused(module, rule, proven) or put(module, rule)
            if why == NOTHING:
                continue
            rows[id(module)] = self._row(module, rule, not why, why or rule.what)
            if why:
                rejected.add(id(module))
                continue
            taken.update(_inside(rule, module))
            yield module

    def _row(self, module: nn.Module, rule: Rule | None, converted: bool, why: str) -> Row:
        return Row(
            self.names[id(module)][0], original_class(module).__name__, rule.name if rule else "", converted, why
        )

    def _refused(self, module: nn.Module, rule: Rule, proven: bool) -> str:
        why = rule.refuses(module)
        if why:
            return why
        for part in (module, *(inner for taken in rule.takes(module) for inner in taken.modules())):
            names = self.names.get(id(part), [])
            if len(names) > 1:
                return f"it, or a part that the rule takes, is shared: {', '.join(names[:3])}"
            if self.skip is not None and id(part) in self.skip:
                return "a part that the rule takes is among those to skip"
        if "forward" in vars(module):
            return "its forward was replaced on the instance"
        return "" if proven else unknown_source(rule, module)


def rule_of(module: nn.Module) -> Rule | None:
    """The rule that knows the class of a module."""
    owner = owner_of(original_class(module))
    return next((rule for rule in RULES.values() if rule.knows(owner)), None)


def _inside(rule: Rule, module: nn.Module) -> set[int]:
    return {id(inner) for taken in rule.takes(module) for inner in taken.modules()}


def _foreign(module: nn.Module) -> str:
    """Why no rule looks into a module whose class hides what it was, or ""."""
    import torch

    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted" if type(module).__name__ == "RecursiveScriptModule" else ""
    if type(module).__module__.startswith(QUANTISED):
        return "it is quantised"
    return ""


def _is_named(name: str, module: nn.Module, one: str | type) -> bool:
    if isinstance(one, str):
        return name == one or fnmatch.fnmatchcase(name, one) or original_class(module).__name__ == one
    return isinstance(module, one)
