"""Developer tools: watch launches, tune, compile ahead of time, read machine code. No launcher imports them."""
