"""Give a model that exists fastseg's blocks: ``convert``, ``revert`` and the report, ``conversion``."""

import fastseg.converting.rules  # noqa: F401  # fills the table of rules
from fastseg.converting.in_place import conversion, convert, revert
from fastseg.converting.report import Conversion, Row

__all__ = ["Conversion", "Row", "conversion", "convert", "revert"]
