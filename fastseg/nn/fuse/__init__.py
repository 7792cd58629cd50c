"""Run existing torch children as one fused op where they allow it, else as they are written."""
