"""The forms of an op, and the one place that chooses between them.

A form is one way to compute an op: a kernel of ours, a library's call, torch's own lines. An op is a list of forms,
``Forms``. The first runs that does not refuse the request and, where it has a cost model, pays. A request is a hashable
tuple of everything that decides; so a choice is made once for each request and then remembered.

``fastseg.explain()`` records the form that ran and why every earlier one did not. ``fastseg.reference()`` and
``fastseg.force`` are honoured here.
"""

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ContextDecorator, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseg.kernels.runtime.verdict import Verdict
from fastseg.ops.core.explain import IN_REFERENCE, Refusal, _in_reference, _report, in_reference, record


class Form:
    """One way to compute an op. Subclass it and name an instance in the op's list.

    ``name`` is the form's name in ``fastseg.force`` and ``fastseg.explain()``. ``path`` is what computes: "triton",
    "cudnn", "torch" (torch's own ops, in a form of ours), or "reference".
    """

    name: str
    path: str = "triton"

    def refuses(self, request: Any) -> str:
        """Why this form cannot compute the request, or "". A pure function of the request."""
        return ""

    def cost(self, request: Any) -> Verdict | None:
        """The model's cost; None if the form has no model and pays wherever it does not refuse."""
        return None

    def why(self, request: Any, refused: Sequence[Refusal]) -> str:
        """Why this form ran, for ``explain``; by default its cost model's sentence."""
        cost = self.cost(request)
        return "" if cost is None else str(cost.says)

    def run(self, *args: Any) -> Any:
        """Compute the op. Raises ``Refused`` where only the call itself shows that it cannot."""
        raise NotImplementedError

    def remember(self, request: Any, why: str) -> None:
        """Refuse this request from now on: ``run`` raised ``Refused``."""
        raise NotImplementedError(f"{type(self).__name__}.run raised Refused, which it cannot remember: {why}")


class Reference(Form):
    """The last form of a list: torch's own ops. It takes every request."""

    path = "reference"

    def __init__(self, run: Callable, name: str = "reference"):
        self.run, self.name = run, name

    def why(self, request: Any, refused: Sequence[Refusal]) -> str:
        return refused[-1].why if refused else ""


class Torchs(Reference):
    """Torch's own ops behind a kernel and forms for a CPU: they run for the reason that refused the kernel."""

    def why(self, request: Any, refused: Sequence[Refusal]) -> str:
        return refused[0].why if refused else ""


class Refused(Exception):
    """Raised by ``Form.run``: a library has no way to compute this request; the form remembers it."""


class Choice(NamedTuple):
    """The form that runs, and why every earlier one does not."""

    form: Form
    refused: tuple[Refusal, ...]
    forced: str = ""  # by which block


IN_FORCE = "inside fastseg.force()"  # the reason of a decision


class Forced:
    """One entered ``force`` block; not ``active`` once it is left, in whatever thread."""

    def __init__(self, op: str, form: str):
        self.op, self.form, self.active = op, form, True


FORMS: dict[str, "Forms"] = {}  # by the name of the op
_forced: ContextVar[tuple[Forced, ...]] = ContextVar("fastseg_forced", default=())


def _asked_for(op: str, blocks: Sequence[Forced]) -> tuple[str, ...]:
    """The forms that the blocks ask for, the innermost first."""
    return tuple(block.form for block in reversed(blocks) if block.op == op and block.active)


class Forms:
    """The forms of one op, in the order in which they are asked.

    Args:
        op: name of the op in ``force`` and ``explain``.
        forms: the last one takes every request.
        aliases: other names of the op.
        backward: True for a list of the op's backward, which ``force`` reaches by the op's name where the backward has
            a form of that name.
    """

    def __init__(self, op: str, forms: Sequence[Form], *, aliases: Sequence[str] = (), backward: bool = False):
        self.op, self.forms = op, tuple(forms)
        self._named = {form.name: form for form in forms}
        self._choice = functools.lru_cache(maxsize=4096)(self._ask)
        if not backward:
            FORMS.update(dict.fromkeys((op, *aliases), self))

    def choose(self, request: Hashable) -> Choice:
        """The form for this request; in ``reference()`` the last, in ``force`` the one that is named."""
        if _in_reference.get() and in_reference():
            return Choice(self.forms[-1], (), IN_REFERENCE)
        blocks = _forced.get()
        forced = _asked_for(self.op, blocks) if blocks else ()
        try:
            return self._choice(request, forced)
        except TypeError:  # the sizes of a graph are symbols, which have no hash
            return self._ask(request, forced)

    def _ask(self, request: Hashable, forced: tuple[str, ...]) -> Choice:
        for name in forced:
            if name in self._named and not self._named[name].refuses(request):
                return Choice(self._named[name], (), IN_FORCE)
        refused = []
        for form in self.forms:
            why = form.refuses(request)
            cost = None if why else form.cost(request)
            if not why and (cost is None or cost.pays):
                return Choice(form, tuple(refused))
            refused.append(Refusal(form.name, why or str(cost.says), cost and cost.microseconds))
        raise AssertionError(f"{self.op}: {self.forms[-1].name}, the last form, refused {request}: {refused}")

    def named(self, name: str) -> Form:
        """The form that a caller has chosen."""
        return self._named[name]

    def forced(self) -> tuple[str, ...]:
        """The forms that ``force`` blocks ask for, the innermost first."""
        blocks = _forced.get()
        return _asked_for(self.op, blocks) if blocks else ()

    def forget(self) -> None:
        """Ask again at the next request."""
        self._choice.cache_clear()

    def decide(self, request: Hashable, recorded: Tensor, name: str = "") -> Form:
        """Choose a form and record it for ``explain``, as a call of ``name`` on ``recorded``; the caller runs it."""
        if torch.compiler.is_dynamo_compiling():
            return self._in_graph(request)
        report = _report.get()
        if report is None and not _forced.get() and not _in_reference.get():  # as ``choose``, in one call less
            try:
                return self._choice(request, ()).form
            except TypeError:
                pass
        choice = self.choose(request)
        if report is not None:
            self._record(choice, request, recorded, name, len(report))
        return choice.form

    def _in_graph(self, request: Any) -> Form:
        """The same choice in code that is compiled: a compiler follows neither what is remembered nor ``force``."""
        if in_reference():
            return self.forms[-1]
        for form in self.forms[:-1]:
            if not form.refuses(request):
                cost = form.cost(request)
                if cost is None or cost.pays:
                    return form
        return self.forms[-1]

    def __call__(self, request: Hashable, *args: Any, recorded: Tensor | None = None) -> Any:
        """Choose a form and return ``form.run(*args)``.

        Args:
            request: all that decides.
            args: of the form.
            recorded: the tensor whose shape, dtype and device ``explain`` shows; None records nothing.
        """
        report = _report.get()
        place = 0 if report is None else len(report)
        while True:
            choice = self.choose(request)
            try:
                y = choice.form.run(*args)
                break
            except Refused as error:
                choice.form.remember(request, str(error))
                self.forget()
        if report is not None and recorded is not None:
            self._record(choice, request, recorded, "", place)
        return y

    def _record(self, choice: Choice, request: Hashable, x: Tensor, name: str, place: int) -> None:
        form, refused, forced = choice
        cost = form.cost(request) if forced != IN_REFERENCE else None
        us = None if cost is None else cost.microseconds
        why = forced or form.why(request, refused)
        if forced == IN_FORCE and cost is not None:
            why = f"{forced}; {cost.says}"
        record(name or self.op, x, form.path, why, form.name, us, refused, place)


class OneKernel(NamedTuple):
    """The request of an op that is one kernel or torch's own ops."""

    no_kernel: str  # why no kernel can run on such tensors, or what follows the call and needs torch's ops; or ""
    sizes: tuple  # what ``KernelForm.unsupported`` takes; () where ``no_kernel`` decides


class KernelForm(Form):
    """The one kernel of an op.

    Args:
        run: launches it.
        unsupported: ``(*sizes) -> why``: why the kernel cannot take these sizes or options, or "".
    """

    name = "kernel"

    def __init__(self, run: Callable, unsupported: Callable[..., str]):
        self.run, self.unsupported = run, unsupported

    def refuses(self, request: OneKernel) -> str:
        return request.no_kernel or self.unsupported(*request.sizes)


class force(ContextDecorator):  # lowercase, because it is used as `with fastseg.force(op, form):`
    """Inside the block, run ``op`` as ``form``, whatever its cost model says: for tests, benchmarks and comparisons.

    A call that the form refuses runs as outside the block; ``fastseg.explain()`` names the form that ran, and why.
    It is scoped to the calling thread or task, as ``fastseg.reference()`` is, which goes before it.

    Args:
        op: name of the op, as ``fastseg.explain()`` shows it.
        form: name of one of its forms.

    Raises:
        ValueError: the op or the form is unknown.

    Example:
        >>> with fastseg.force("separable_conv2d", "split"):  # doctest: +SKIP
        ...     y = block(x)
    """

    def __init__(self, op: str, form: str):
        import fastseg.ops  # noqa: F401 (its modules name their forms)

        if op not in FORMS:
            raise ValueError(f"force: no op {op!r} has forms to choose from; known: {', '.join(sorted(FORMS))}")
        names = [f.name for f in FORMS[op].forms]
        if form not in names:
            raise ValueError(f"force: {op} has no form {form!r}; use one of {', '.join(names)}")
        self.op, self.form = FORMS[op].op, form
        self._blocks: list[Forced] = []  # one per entry

    def _recreate_cm(self) -> "force":
        return force(self.op, self.form)

    def __enter__(self) -> "force":
        self._blocks.append(Forced(self.op, self.form))
        _forced.set((*_forced.get(), self._blocks[-1]))
        return self

    def __exit__(self, *exc) -> None:
        self._blocks.pop().active = False
        _forced.set(tuple(block for block in _forced.get() if block.active))


def watched_or_changed() -> bool:
    """True inside ``explain``, ``force`` or ``reference``: each call must then ask which form runs."""
    return _report.get() is not None or bool(_forced.get()) or in_reference()


def forced_blocks() -> tuple[Forced, ...]:
    """The ``force`` blocks around this call, for ``forcing`` in another thread."""
    return _forced.get()


@contextmanager
def forcing(blocks: tuple[Forced, ...]) -> Iterator[None]:
    """Inside the block, force what was forced around a forward: autograd may run its backward in another thread."""
    token = _forced.set(blocks)
    try:
        yield
    finally:
        _forced.reset(token)
