"""Write weights back in the form of the file that they came from: its names, nesting, shapes and dtypes."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastseg.io.images import atomic_write
from fastseg.models.keys import model_forms
from fastseg.models.weights import checked, read_payload, weight_file


def save_weights_like(model: nn.Module, path: str | Path, like: str | Path, *, key: str | None = None) -> None:
    """Write the weights of ``model`` as the file ``like`` holds them: what ``load_weights`` read, under its own names.

    Every tensor of the file that the model has is replaced; prefixes, such as "module." and "model.", dictionaries
    around the weights, dtypes, and entries that the model does not have stay as they are. The original's code reads the
    file as it read ``like``. Any model does, ours, another library's, converted or not.

    Args:
        model: any model that ``fastseg.models.load_weights`` loads ``like`` into.
        path: written atomically: safetensors if ``like`` is, else of ``torch.save``.
        like: the file, or a folder of ``save_pretrained`` with one.
        key: name on the way to one set of weights, as for ``load_weights``.

    Raises:
        FileNotFoundError: ``like`` does not exist.
        ValueError: ``like`` does not fit the model, or lacks tensors that the model has of its own.
    """
    source = weight_file(like, "save_weights_like")
    payload = read_payload(source)
    state = model.state_dict()
    found = checked(payload, source, type(model).__name__, state, model_forms(model), key=key,
                    function="save_weights_like")  # fmt: skip
    if found.form.constants:
        raise ValueError(f"save_weights_like: {source} has no place for {', '.join(list(found.form.constants)[:3])}")
    places = {value.data_ptr() if value.numel() else id(value): target for target, value in found.tensors.items()}
    new: dict[str, Tensor] = {}

    def replaced(value: Any) -> Any:
        if isinstance(value, Tensor):
            target = places.get(value.data_ptr() if value.numel() else id(value))
            if target is None or value.numel() != state[target].numel():
                return value
            new[target] = state[target].detach().cpu().to(value.dtype).reshape(value.shape).clone()
            return new[target]
        if isinstance(value, dict):
            copied = value.copy()
            copied.update((name, replaced(inner)) for name, inner in value.items())
            return copied
        return type(value)(map(replaced, value)) if type(value) in (list, tuple) else value

    result = replaced(payload)
    missing = found.tensors.keys() - new.keys()
    if missing:
        raise ValueError(f"save_weights_like: {source} has no place for {', '.join(sorted(missing)[:3])}")
    with atomic_write(path) as file:
        if _is_safetensors(source):
            from safetensors.torch import save

            data = save({name: value.contiguous() for name, value in result.items()}, metadata={"format": "pt"})
            file.write(data)
        else:
            torch.save(result, file)


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"
