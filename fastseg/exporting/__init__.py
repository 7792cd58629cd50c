"""Models as files that other programs run, such files as models, and models of other libraries by name."""

from fastseg.exporting.answer import OUTPUTS
from fastseg.exporting.export import Exported, export
from fastseg.exporting.file_model import FileModel
from fastseg.exporting.preprocessing import Preprocessing
from fastseg.exporting.sources import load_model

__all__ = ["OUTPUTS", "Exported", "FileModel", "Preprocessing", "export", "load_model"]
