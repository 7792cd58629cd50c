"""The ops registered with ``torch.library`` and the autograd Functions over them, named as kernel families."""
