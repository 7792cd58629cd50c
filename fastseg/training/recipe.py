"""The articles' training settings, as files: ``fastseg train --recipe voc-deeplabv3plus --data VOC2012 -o run``.

A recipe is ``recipes/NAME.json``: where its settings are published ("source"), how this training differs from that
("differs"), the data, and the settings. These are defaults of ``fastseg train``; arguments beside ``--recipe`` override
them. Tests build each recipe's net and run it on a few synthetic pictures in each layout. Nobody has run a recipe at
full size with this library, so no score is promised.
"""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("recipes")
UNTRIED = "nobody has run it at full size with fastseg yet"
ABOUT = ("source", "data", "differs")
SETTINGS = (
    "layout", "train_split", "dataset", "model", "options", "iterations", "epochs", "batch", "optimizer", "lr",
    "momentum", "weight_decay", "schedule", "class_weights", "size", "crop", "scale", "flip", "deep_supervision",
)  # fmt: skip


def recipes() -> list[str]:
    """The names of all recipes, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def read_recipe(name: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the recipe's description and its settings.

    "dataset" is the path of the file that names the classes; "options" are those of the model.

    Raises:
        ValueError: there is no such recipe.
    """
    if name not in recipes():
        raise ValueError(f"no recipe {name!r}; use one of {', '.join(recipes())}")
    content = json.loads((FOLDER / f"{name}.json").read_text())
    unknown = set(content) - set(ABOUT) - set(SETTINGS)
    assert not unknown, f"{name}: {unknown}"
    settings = {key: content[key] for key in SETTINGS if key in content}
    if "dataset" in settings:
        settings["dataset"] = FOLDER / "datasets" / f"{settings['dataset']}.json"
    return {key: content[key] for key in ABOUT}, settings
