"""Names that other codes give to the tensors of our models."""

from fastseg.models.keys.encoders import encoder_forms
from fastseg.models.keys.form import COUNTER, Form
from fastseg.models.keys.models import model_forms

__all__ = ["COUNTER", "Form", "encoder_forms", "model_forms"]
