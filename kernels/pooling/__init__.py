"""Max pooling with compact indices, max unpooling, and unpooling inside a convolution."""
