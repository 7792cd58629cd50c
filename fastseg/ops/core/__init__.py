"""Shared by all ops: dispatch, explain, registration, layouts, autograd helpers."""
