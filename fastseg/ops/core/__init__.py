"""What all ops share: dispatch, explain, registration, layouts, autograd helpers."""
