"""Run existing torch children as one fused op if they allow it, else as written."""
